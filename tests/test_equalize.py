"""Equalization between layers: the same function in float64, with ranges that meet."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import SqueezeExcite, Variant, create_model, reparam
from repvgg_jax.text import named_leaves
from tests.helpers.trees import random_images, random_variables

pytestmark = pytest.mark.core

PLAIN = Variant("plain", (2, 1), (8, 16), 8, strides=(2, 1))
NETWORKS = {
    "plain": PLAIN,
    "grouped": Variant("grouped", (2, 2), (8, 16), 8, strides=(2, 1), groups=4),
    "depthwise": Variant("mobile", (1, 1), (8, 16), 8, strides=(2, 1), block="mobileone"),
    "gate before ReLU": Variant("se", (1, 1), (8, 16), 8, se=SqueezeExcite(4)),
    "gate after ReLU": Variant("se", (1, 1), (8, 16), 8, se=SqueezeExcite(4, after_relu=True)),
}


@functools.cache
def made(variant):
    """A float64 network, its deploy-form variables with uneven channels, and its layers."""
    with jax.enable_x64(True):
        options = {"dtype": jnp.float64, "param_dtype": jnp.float64, "lowering": "plain"}
        model = create_model(variant, num_classes=5, **options)
        fused = model.fuse(random_variables(model, size=8, seed=3))
    rng = np.random.default_rng(4)
    for block in fused["params"].values():
        for leaf in block.get("reparam", {}).values():
            leaf *= np.exp2(rng.integers(-4, 4, leaf.shape[-1]))
    return model.clone(deploy=True), fused, [layer.name for layer in model.layers] + ["head"]


def deployed(variant):
    model, fused, order = made(variant)
    return model, jax.tree.map(np.copy, fused), order


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_function_stays_in_float64(kind):
    model, fused, order = deployed(NETWORKS[kind])
    rng = np.random.default_rng(5)
    channels = {layer.name: layer.features for layer in model.layers}
    activations = {name: rng.uniform(0.1, 9, count) for name, count in channels.items()}
    with jax.enable_x64(True):
        images = random_images((2, 8, 8, 3), dtype=np.float64)
        apply = jax.jit(model.apply)
        expected = np.asarray(apply(fused, images))
        for measured in (None, activations):
            after = reparam.equalize(fused, order, activations=measured)
            assert jax.tree.structure(after) == jax.tree.structure(fused)
            found = np.asarray(apply(after, images))
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
            before = named_leaves(fused)
            for name, leaf in named_leaves(after).items():
                stays = ("head/bias", "se/expand/kernel", "se/expand/bias", "se/reduce/bias")
                assert np.array_equal(leaf, before[name]) is name.endswith(stays), name
    assert np.abs(expected).max() > 0


def test_both_sides_of_every_channel_get_the_same_range():
    _, fused, order = deployed(PLAIN)
    after = reparam.equalize(fused, order, sweeps=200)["params"]
    kernels = [after[name]["reparam"]["kernel"] for name in order[:-1]] + [after["head"]["kernel"]]
    for before, behind in itertools.pairwise(kernels):
        mine = np.abs(before).reshape(-1, before.shape[-1]).max(0)
        theirs = np.abs(behind).max(axis=(*range(behind.ndim - 2), -1))
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_measured_ranges_become_the_root_of_range_and_weight():
    # With one pair of layers the answer is known: s = sqrt(a / r2).
    params = {
        "a": {"kernel": np.ones((1, 1, 1, 2)), "bias": np.zeros(2)},
        "b": {"kernel": np.array([[4.0], [1.0]]), "bias": np.zeros(1)},
    }
    after = reparam.equalize(params, ["a", "b"], activations={"a": np.array([1.0, 9.0])})
    np.testing.assert_allclose(after["a"]["kernel"].ravel(), [2, 1 / 3])
    np.testing.assert_allclose(after["b"]["kernel"].ravel(), [2, 3])


def test_dead_channels_stay_and_nothing_becomes_infinite():
    _, fused, order = deployed(PLAIN)
    dead = fused["params"]["stem"]["reparam"]
    dead["kernel"][..., 2], dead["bias"][2] = 0, 1
    after = reparam.equalize(fused, order)["params"]["stem"]["reparam"]
    assert after["bias"][2] == 1
    assert np.isfinite(after["kernel"]).all()


def test_jax_arrays_in_jit_and_boxes():
    _, fused, order = deployed(PLAIN)
    traced = jax.jit(lambda tree: reparam.equalize(tree, order))(
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), fused)
    )
    expected = reparam.equalize(fused, order)
    for name, leaf in named_leaves(traced).items():
        assert isinstance(leaf, jax.Array)
        np.testing.assert_allclose(leaf, named_leaves(expected)[name], rtol=1e-4, atol=1e-6)
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), fused)
    found = reparam.equalize(boxed, order)
    assert isinstance(found["params"]["stem"]["reparam"]["kernel"], nn.Partitioned)
    for name, leaf in named_leaves(nn.unbox(found)).items():
        np.testing.assert_array_equal(leaf, named_leaves(expected)[name])


def test_bad_input():
    _, fused, order = deployed(PLAIN)
    untouched = fused["params"]["stem"]["reparam"]["bias"].copy()
    reparam.equalize(fused, order)
    with pytest.raises(ValueError, match="no layer stage9"):
        reparam.equalize(fused, ["stem", "stage9"])
    with pytest.raises(ValueError, match=r"8 output channels.*16 input"):
        reparam.equalize(fused, ["stem", "head"])
    with pytest.raises(ValueError, match="two layers"):
        reparam.equalize(fused, ["stem"])
    trained = random_variables(create_model(PLAIN, num_classes=5), size=8)
    with pytest.raises(ValueError, match="fuse_params"):
        reparam.equalize(trained, order)
    np.testing.assert_array_equal(fused["params"]["stem"]["reparam"]["bias"], untouched)
