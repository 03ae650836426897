"""Variables to test on: random everywhere, in statistics and affines too.

Freshly initialized statistics (mean 0, variance 1) would hide most mistakes of a fold.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax import RepVGG, SqueezeExcite, Variant
from repvgg_jax.text import named_leaves

TINY = Variant("tiny", depths=(1, 2), channels=(8, 16), stem_channels=8)
TINY_AUXILIARY = Variant(
    "tiny-plus",
    depths=(2, 2),
    channels=(8, 16),
    stem_channels=8,
    se=SqueezeExcite(4, after_relu=True),
    auxiliary=("stage1_block1", "stage2_block0"),
)


def random_leaf(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """A value that a trained network could have."""
    if name == "kernel":
        fan_in = max(1, int(np.prod(shape[:-1])))
        return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(dtype)
    if name == "var":
        return rng.uniform(0.1, 4.0, shape).astype(dtype)
    if name == "scale":
        return (rng.uniform(0.3, 2.0, shape) * rng.choice([-1, 1], shape)).astype(dtype)
    return (0.5 * rng.standard_normal(shape)).astype(dtype)  # bias, mean


def randomize(tree: Any, seed: int = 0) -> Any:
    """NumPy leaves of the same shapes and dtypes with random values."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: random_leaf(rng, path[-1].key, leaf.shape, leaf.dtype), tree
    )


def random_variables(model: RepVGG, *, size: int = 32, channels: int = 3, seed: int = 0) -> Any:
    """Random variables of a network, without initializing it."""
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return randomize(jax.eval_shape(model.init, jax.random.key(0), images), seed)


def random_images(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Normalized images."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def paths(tree: Any) -> list[str]:
    """Every leaf as `params/stem/conv3x3/kernel`."""
    return list(named_leaves(tree))
