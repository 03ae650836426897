"""Scales of RepOptimizers from the authors' files, which have them alone or in a whole network."""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from repvgg_jax.text import first_few
from repvgg_jax.weights import files
from repvgg_jax.weights.names_family import REPOPT
from repvgg_jax.weights.state_dict import find_state_dict
from repvgg_jax.weights.tensor import read_float32

_OURS = {theirs: ours for ours, theirs in REPOPT.items() if ours.startswith("scale_")}
_KEY = re.compile(rf"stage(\d+)\.(?:(\d+)\.)?({'|'.join(_OURS)})\.weight", re.ASCII)


def load_scales(
    source: str | os.PathLike | Mapping[str, Any], *, entry: str | None = None
) -> dict[str, Any]:
    """The scales in a file of RepOptimizers, e.g. `RepOpt-VGG-B1-scales.pth`.

    Args:
      source: a file, or a state dict, with keys such as `stage1.0.scale_conv.weight`, which may be
        inside other mappings. Other keys are left out.
      entry: which state dict, as in `load_weights`.

    Returns:
      `{"stage1_block0": {"scale_3x3": {"scale": …}, …}, …}` for `reparam.rep_optimizer`, float32.

    Raises:
      ValueError: not a readable file, or there are no scales in it.
    """
    contents, where = files.contents_of(source)
    scales: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    try:
        state = find_state_dict(contents.value, entry, lambda shapes: any(map(_match, shapes)))
        for key, tensor in state.tensors.items():
            if match := _match(key):
                stage, index, name = match.groups()
                block = f"stage{stage}_block{index}" if index is not None else "stem"
                leaf = read_float32(tensor, key).reshape(-1)
                scales.setdefault(block, {})[_OURS[name]] = {"scale": leaf}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not scales:
        raise ValueError(
            f"{where}: no scales, such as stage1.0.scale_conv.weight; the keys are "
            f"{first_few(state.tensors)}"
        )
    return scales


def _match(key: str) -> re.Match[str] | None:
    return _KEY.fullmatch(key.removeprefix("module."))
