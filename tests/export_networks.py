"""Small networks of every kind, fused from random statistics, for the tests of exports."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import repvgg_jax as rv
from repvgg_jax.export import Metadata, Network

KINDS = ("plain", "grouped", "se-before", "se-after", "dilated", "features")
CLASSES = 5


def variant(**options: Any) -> rv.Variant:
    return rv.Variant(
        "tiny", (2, 2, 1), (8, 16, 16), stem_channels=8, strides=(2, 2, 1), **options
    )


def model(kind: str) -> rv.RepVGG:
    """A network in training form; 24 pixels become 3, or 12 where it is dilated."""
    built = {
        "plain": variant(),
        "grouped": variant(groups=4),
        "se-before": variant(se=rv.SqueezeExcite(reduction=4)),
        "se-after": variant(se=rv.SqueezeExcite(reduction=4, after_relu=True)),
        "dilated": variant(groups=2),
        "features": variant(),
    }[kind]
    return rv.create_model(
        built,
        num_classes=0 if kind == "features" else CLASSES,
        output_stride=2 if kind == "dilated" else None,
    )


@functools.cache
def variables(kind: str) -> Any:
    """Training-form variables with random affines and running statistics."""
    rng = np.random.default_rng(KINDS.index(kind))
    shapes = jax.eval_shape(model(kind).init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        elif name == "kernel":
            values = rng.normal(0, (1 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
        else:
            values = rng.normal(0, 0.3, leaf.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def images() -> np.ndarray:
    """Three more than one batch of a proof, uint8 (19, 24, 24, 3)."""
    return np.random.default_rng(7).integers(0, 256, (19, 24, 24, 3), np.uint8)


def metadata(kind: str) -> Metadata:
    labels = () if kind == "features" else ("cat", "dog", "élan", "fox", "gnu")
    return Metadata(mean=(0.4, 0.45, 0.5), std=(0.2, 0.25, 0.3), labels=labels)


@functools.cache
def network(kind: str, with_preprocessing: bool = False) -> Network:
    return Network(
        model(kind),
        rv.fuse_params(variables(kind)),
        images=images(),
        metadata=metadata(kind),
        with_preprocessing=with_preprocessing,
    )


@functools.cache
def train_form_logits(kind: str) -> np.ndarray:
    """What artefacts must answer, from the three-branch network that was never fused."""
    normalised = (images() / np.float32(255) - metadata(kind).mean) / metadata(kind).std
    with jax.default_matmul_precision("highest"):
        return np.asarray(model(kind).apply(variables(kind), normalised.astype(np.float32)))


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def relative(reference: np.ndarray, other: np.ndarray) -> float:
    assert reference.shape == other.shape
    return float(np.abs(reference - other).max() / np.abs(reference).max())
