"""Checksums of arrays wherever they are: sharded over devices, or over several processes.

A file's checksum would need the bytes in one place. This one is a sum modulo 2^32 of a mixed
word for every word of the array, which any number of devices computes in any order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> dict[str, str]:
    """A checksum of every array, 8 hexadecimal digits, by its path in the tree.

    A change of any one word changes it for certain, a change of several but for a chance of
    one in 2^32. It depends on values, dtype's width and positions, not on sharding.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{int(value):08x}"
        for (path, _), value in zip(leaves, sums, strict=True)
    }


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(array: jax.Array) -> jax.Array:
    words = _words(array)
    strides = [math.prod(words.shape[axis + 1 :]) for axis in range(words.ndim)]
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += index * np.uint32(stride % 2**32)
    # At every place a bijection of the word: no single change can go unseen.
    mixed = words ^ (place * np.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return (mixed ^ (mixed >> np.uint32(16))).sum(dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits as uint32; wider values become several words along a new last axis."""
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    width = min(32, 8 * array.dtype.itemsize)
    return jax.lax.bitcast_convert_type(array, f"uint{width}").astype(jnp.uint32)
