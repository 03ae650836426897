"""Small networks of every kind, fused from random statistics, for the tests of exports."""

import atexit
import dataclasses
import functools
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from repvgg_jax import RepVGG, SqueezeExcite, Variant, create_model, get_variant
from repvgg_jax.convert.source import Source
from repvgg_jax.export import FORMATS, Artifact, Network, Normalize, export
from tests.helpers.trees import random_variables

# As in repvgg_jax.export.onnx, for tests that import openvino before it does.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

KINDS = ("plain", "grouped", "se-before", "se-after", "dilated", "features")
ACTIVATED = ("silu", "linear", "repvit")  # of other activations than ReLU
HEIGHT, WIDTH = 24, 32
LABELS = ("cat", "dog", "élan", "fox", "gnu")
MEAN, STD = (0.4, 0.45, 0.5), (0.2, 0.25, 0.3)


REPVIT = dataclasses.replace(
    get_variant("repvit_m0_9"), depths=(1, 1), channels=(8, 16), stem_channels=8, strides=(1, 2)
)


def variant(**options: Any) -> Variant:
    return Variant("tiny", (2, 2, 1), (8, 16, 16), stem_channels=8, strides=(2, 2, 1), **options)


def model(kind: str) -> RepVGG:
    """In training form. 24 pixels become 3, or 12 where it is dilated."""
    variants = {
        "plain": variant(),
        "grouped": variant(groups=4),
        "se-before": variant(se=SqueezeExcite(reduction=4)),
        "se-after": variant(se=SqueezeExcite(reduction=4, after_relu=True)),
        "dilated": variant(groups=2),
        "features": variant(),
        "silu": variant(se=SqueezeExcite(reduction=4)),
        "linear": variant(),
        "repvit": REPVIT,
    }
    return create_model(
        variants[kind],
        num_classes=0 if kind == "features" else len(LABELS),
        output_stride=2 if kind == "dilated" else None,
        activation={"silu": nn.silu, "linear": None}.get(kind, "auto"),
    )


@functools.cache
def variables(kind: str) -> Any:
    """Training form, NumPy, with random affines and running statistics."""
    return random_variables(model(kind), size=HEIGHT, seed=(*KINDS, *ACTIVATED).index(kind))


@functools.cache
def images() -> np.ndarray:
    """uint8, one image and a batch of a proof."""
    return np.random.default_rng(7).integers(0, 256, (17, HEIGHT, WIDTH, 3), np.uint8)


def fresh(kind: str, with_preprocessing: bool = False) -> Network:
    """A network that a test may damage."""
    return Network(
        model(kind),
        model(kind).fuse(variables(kind)),
        images=images(),
        normalize=Normalize(MEAN, STD),
        labels=() if kind == "features" else LABELS,
        with_preprocessing=with_preprocessing,
    )


network = functools.cache(fresh)
"""The same, shared between tests with its answers."""


@functools.cache
def artifact(
    name: str, kind: str, dtype: str | None = None, with_preprocessing: bool = False
) -> Artifact:
    """An artifact that tests only read, written once."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    form = FORMATS[name]
    return export(name, network(kind, with_preprocessing), directory / form.filename, dtype=dtype)


@functools.cache
def expected(kind: str) -> np.ndarray:
    """What artifacts must answer: the three-branch network on images normalized by hand."""
    normalized = (images() / 255 - np.asarray(MEAN)) / np.asarray(STD)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(model(kind).apply)
        return np.asarray(apply(variables(kind), normalized.astype(np.float32)))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def log(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities, as far down as float32 reaches in every runtime."""
    return np.log(np.maximum(probabilities, 1e-30))


def relative(reference: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, relative to the largest of the reference."""
    assert reference.shape == other.shape
    return float(np.abs(reference - other).max() / np.abs(reference).max())


def documented(section: str) -> list[str]:
    """The Python blocks of a section of docs/deploy.md."""
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def source(kind: str = "plain", **options: Any) -> Source:
    """What `convert` takes for a network of that kind, in training form."""
    values = {
        "title": f"RepVGG {kind}",
        "model": model(kind),
        "variables": variables(kind),
        "images": images(),
        "image_source": "17 random images",
        "normalize": Normalize(MEAN, STD),
        "labels": () if kind == "features" else LABELS,
        "details": {"weights": "none"},
    }
    return Source(**{**values, **options})
