"""The counts of benchmarks/segmentation.py, on networks that are counted by hand."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import repvgg_jax as rv

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("segmentation")


def test_macs_of_a_classifier_are_those_of_cost(benchmark):
    """Both forms, groups and strides included; the classifier is no convolution."""
    for deploy in (False, True):
        model = rv.create_model("A0", num_classes=0, deploy=deploy, lowering="plain")
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        counted = benchmark.convolutions.count(jax.jit(model.apply), variables, images).macs
        cost = rv.cost("A0", image_size=64, num_classes=0)
        assert counted == (cost.macs_deploy if deploy else cost.macs_train)


def test_macs_of_groups(benchmark):
    conv = nn.Conv(8, (3, 3), feature_group_count=4, padding="SAME")
    images = jax.ShapeDtypeStruct((2, 5, 7, 4), jnp.float32)
    variables = jax.eval_shape(conv.init, jax.random.key(0), images)
    counted = benchmark.convolutions.count(conv.apply, variables, images).macs
    assert counted == 2 * 5 * 7 * 8 * 9 * 1


def test_every_row_has_the_name_of_the_paper(benchmark):
    assert [row.name for row in benchmark.ROWS] == [
        "RepVGG-B1g2-fast", "ResNet-50", "RepVGG-B1g2", "RepVGG-B2-fast", "ResNet-101", "RepVGG-B2"
    ]  # fmt: skip
