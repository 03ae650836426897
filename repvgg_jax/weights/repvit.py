"""Reading RepViT as timm names it, in training form or after its `fuse`."""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from repvgg_jax.text import first_few
from repvgg_jax.weights import files
from repvgg_jax.weights.state_dict import find_state_dict
from repvgg_jax.weights.tensor import Shapes, read_float32

_BLOCK = r"stages\.(?P<stage>\d+)\.(?:blocks\.(?P<block>\d+)|(?P<pre>downsample\.pre_block))"
_MODULES = {
    r"stem\.conv(?P<number>[12])": "stem{number}",
    rf"{_BLOCK}\.token_mixer": "{place}_mixer",
    rf"{_BLOCK}\.se\.fc(?P<number>[12])": "{place}_se/{linear}",
    rf"{_BLOCK}\.channel_mixer\.conv(?P<number>[12])": "{place}_{half}",
    r"stages\.(?P<stage>\d+)\.downsample\.spatial_downsample": "stage{stage}_down_spatial",
    r"stages\.(?P<stage>\d+)\.downsample\.channel_downsample": "stage{stage}_down_channel",
    r"stages\.(?P<stage>\d+)\.downsample\.ffn\.conv(?P<number>[12])": "stage{stage}_down_{half}",
    r"head\.head": "head",
    r"head\.head_dist": "head",
    r"head": "head",  # fused by timm
}
_CHILDREN = {
    # What follows the module's name, by kind of module: our names of the children.
    "mixer": {
        "conv.c": "conv_dense",
        "conv.bn": "bn_dense",
        "conv1": "conv_point",
        "bn": "bn_mixer",
    },
    "conv": {"c": "conv_single", "bn": "bn_single"},
    "head.head": {"bn": "bn_head", "l": "head"},
    "head.head_dist": {"bn": "bn_head_dist", "l": "head_dist"},
    "se": {"": ""},
}
_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def load_repvit(
    source: str | os.PathLike | Mapping[str, Any], *, entry: str | None = None
) -> dict[str, Any]:
    """The variables of a `repvgg_jax.repvit.RepViT`.

    Args:
      source: a file, or a state dict of NumPy, JAX or PyTorch arrays, which may be inside other
        mappings; of timm's `repvit_m0_9` to `repvit_m2_3`, e.g. of its pretrained models.
      entry: which state dict, as in `load_weights`.

    Returns:
      `{"params": …, "batch_stats": …}` of the training form, or `{"params": …}` of the deploy form
      if timm's `fuse` was called before; float32 NumPy arrays.

    Raises:
      ValueError: not a readable file, keys of another network (those of m1 to m3, which lack the
        norm behind the mixer, included), or damaged arrays.
    """
    contents, where = files.contents_of(source)
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    unknown: list[str] = []
    try:
        state = find_state_dict(contents.value, entry, _has_repvit)
        for key, tensor in state.tensors.items():
            if key.endswith("num_batches_tracked"):
                continue
            path = _path(key, len(tensor.shape))
            if path is None:
                unknown.append(key)
                continue
            leaves[path] = _array(read_float32(tensor, key), path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if unknown or not leaves:
        raise ValueError(f"{where} is not a RepViT: it has {first_few(unknown) or 'no arrays'}")
    return unflatten_dict(leaves)


def _has_repvit(shapes: Shapes) -> bool:
    return any(".token_mixer." in key for key in shapes)


def _path(key: str, axes: int) -> tuple[str, ...] | None:
    """Our path of an array with that many axes; None for one that no RepViT has."""
    name, _, leaf = key.rpartition(".")
    for pattern, place in _MODULES.items():
        found = re.match(rf"{pattern}(?:\.|$)", name)
        if found is None:
            continue
        module, child = found.group().rstrip("."), name[found.end() :]
        at = place.format(**_words(found.groupdict()))
        kind = module if module.startswith("head") else "conv"
        kind = "mixer" if at.endswith("_mixer") else "se" if "_se/" in at else kind
        if not child and leaf in ("weight", "bias") and kind != "se":  # fused by timm
            return ("params", at, "reparam", "kernel" if leaf == "weight" else "bias")
        ours = _CHILDREN.get(kind, {}).get(child)
        if ours is None:
            return None
        steps = tuple(step for step in (*at.split("/"), ours) if step)
        if ours.startswith("bn_"):
            if axes != 1 or leaf not in _NORM:
                return None
            collection, last = _NORM[leaf]
            return (collection, *steps, last)
        if leaf not in ("weight", "bias"):
            return None
        return ("params", *steps, "kernel" if leaf == "weight" else "bias")
    return None


def _words(groups: Mapping[str, str | None]) -> dict[str, str]:
    """What the places of modules are made of."""
    stage, number = groups.get("stage") or "0", int(groups.get("number") or 1)
    block = groups.get("block")
    return {
        "stage": stage,
        "number": str(number - 1),
        "place": f"stage{stage}_down_block" if block is None else f"stage{stage}_block{block}",
        "linear": ("reduce", "expand")[number - 1],
        "half": ("expand", "project")[number - 1],
    }


def _array(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """An array in our layout: kernels are HWIO, those of gates (in, out)."""
    if path[-1] != "kernel":
        return array
    if path[-2] in ("reduce", "expand"):
        return array.reshape(array.shape[:2]).T
    return (array if array.ndim == 4 else array[..., None, None]).transpose(2, 3, 1, 0)
