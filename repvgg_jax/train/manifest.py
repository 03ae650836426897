"""The manifest of a checkpoint: checksum, dtype and shape of every array, and a digest of itself.

A checksum of files would need all bytes in one place. The checksum of an array here is the sum
modulo 2^32 of one mixed word per word of the array, which devices and processes compute on their
own shards, in any order.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from repvgg_jax import files
from repvgg_jax.text import named_leaves
from repvgg_jax.typed import typed

_CLASSES = "the number of classes, which is that of the data (config.data.source)"

# What determines the shape of an array, by prefix of its name; the first match counts.
_SETTINGS = (
    ("params/head", _CLASSES),
    ("params/aux_", _CLASSES),
    ("params/pyramid", "config.segmentation.bins and config.model.variant"),
    ("params/decoder", "config.segmentation.width and config.model.variant"),
    ("opt_state", "config.optimizer.name and config.optimizer.clip_norm"),
    ("ema", "config.ema.decay"),
    ("", "config.model.variant and the data's image channels"),
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a saved state.

    Attributes:
      checksums: of every array, 8 hexadecimal digits, by its path in the tree.
      arrays: dtype and shape of every array, e.g. `float32[3, 3, 8, 16]`.
      saved_on: devices and processes, e.g. `8 cpu devices in 1 process`.
      accuracy: validation accuracy of the state, a fraction; None if it was not evaluated.
    """

    checksums: dict[str, str]
    arrays: dict[str, str]
    saved_on: str
    accuracy: float | None

    @classmethod
    def of(cls, state: Any, accuracy: float | None) -> Self:
        """Describes a state that is about to be saved."""
        return cls(checksums(state), _arrays(state), topology(), accuracy)

    @classmethod
    def read(cls, step: pathlib.Path) -> Self:
        """Reads the manifest in the directory of a checkpoint.

        Raises:
          ValueError: it is damaged.
          OSError: it is missing or cannot be read.
        """
        content = files.read_json(step / "manifest" / "metadata")
        content = typed(dict[str, Any], content, "manifest")
        digest = content.pop("digest", None)
        if digest != files.json_digest(content):
            raise ValueError("its digest does not match its content")
        return typed(cls, content, "manifest")

    def content(self) -> dict[str, Any]:
        """What is written to disk and `read` takes back."""
        plain = dataclasses.asdict(self)
        return {**plain, "digest": files.json_digest(plain)}

    def difference(self, like: Any) -> str | None:
        """How the saved arrays differ from those of `like`, and the settings behind it, or None."""
        found = _arrays(like)
        names = [*found, *(name for name in self.arrays if name not in found)]
        differ = [name for name in names if self.arrays.get(name) != found.get(name)]
        if not differ:
            return None
        first = differ[0]
        settings = next(text for prefix, text in _SETTINGS if first.startswith(prefix))
        return (
            f"{first} is {self.arrays.get(first, 'missing')} there and "
            f"{found.get(first, 'missing')} here ({len(differ)} of {len(names)} arrays differ); "
            f"make {settings} what the checkpoint was trained with"
        )

    def abstract_variables(self) -> dict[str, Any]:
        """Shapes and dtypes of the network's variables, nested by their names in the state.

        Returns:
          `{"ema": {"params": …, "batch_stats": …}}` if moving averages were saved, else
          `{"params": …, "batch_stats": …}`.
        """
        averaged = any(name.startswith("ema/") for name in self.arrays)
        wanted = ("ema/",) if averaged else ("params/", "batch_stats/")
        leaves = {n: _parse(text) for n, text in self.arrays.items() if n.startswith(wanted)}
        return traverse_util.unflatten_dict(leaves, sep="/")


def topology() -> str:
    """Devices and processes of this run, e.g. `8 cpu devices in 1 process`."""
    devices, processes = jax.device_count(), jax.process_count()
    kind = f"{jax.devices()[0].platform} device{'s' if devices > 1 else ''}"
    return f"{devices} {kind} in {processes} process{'es' if processes > 1 else ''}"


def checksums(tree: Any) -> dict[str, str]:
    """A checksum of every array, 8 hexadecimal digits, by its path in the tree.

    It changes with certainty if one word changes, and with probability 1 - 2^-32 if several do.
    It depends on values, positions and the dtype's width, not on sharding.
    """
    leaves = named_leaves(tree)
    sums = jax.device_get(_sums(list(leaves.values())))
    return {name: f"{int(value):08x}" for name, value in zip(leaves, sums, strict=True)}


def not_finite(tree: Any) -> list[str]:
    """Paths of the arrays that hold an infinity or a NaN; on all devices, as `checksums`."""
    leaves = {n: x for n, x in named_leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = jax.device_get(_finite(list(leaves.values())))
    return [name for name, value in zip(leaves, finite, strict=True) if not value]


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(array: jax.Array) -> jax.Array:
    words = _words(array)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += index * np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
    # At every position a bijection of the word (MurmurHash3's finalizer), so no single change
    # goes unnoticed.
    mixed = words ^ (position * np.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return (mixed ^ (mixed >> np.uint32(16))).sum(dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits as uint32; wider values become several words along a new last axis."""
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    width = min(32, 8 * array.dtype.itemsize)
    return jax.lax.bitcast_convert_type(array, f"uint{width}").astype(jnp.uint32)


def _arrays(tree: Any) -> dict[str, str]:
    return {
        name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for name, leaf in named_leaves(tree).items()
    }


def _parse(text: str) -> jax.ShapeDtypeStruct:
    dtype, _, shape = text.partition("[")
    return jax.ShapeDtypeStruct(tuple(json.loads(f"[{shape}")), np.dtype(dtype))
