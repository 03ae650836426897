"""Scales of RepOptimizers from the authors' files, which have them alone or in a whole network."""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from repvgg_jax.text import first_few
from repvgg_jax.weights import files
from repvgg_jax.weights.names_family import REPOPT
from repvgg_jax.weights.tensor import describe, read_float32

_OURS = {theirs: ours for ours, theirs in REPOPT.items() if ours.startswith("scale_")}
_KEY = re.compile(rf"stage(\d+)\.(?:(\d+)\.)?({'|'.join(_OURS)})\.weight", re.ASCII)


def load_scales(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """The scales in a file of RepOptimizers, e.g. `RepOpt-VGG-B1-scales.pth`.

    Args:
      source: a file, or a state dict, with keys such as `stage1.0.scale_conv.weight`; under
        `model` or `state_dict` as well. Other keys are left out.

    Returns:
      `{"stage1_block0": {"scale_3x3": {"scale": …}, …}, …}` for `reparam.rep_optimizer`, float32.

    Raises:
      ValueError: not a readable file, or there are no scales in it.
    """
    where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    saved: Any = source if isinstance(source, Mapping) else files.read(source)
    for wrapper in ("model", "state_dict"):
        if isinstance(saved.get(wrapper), Mapping):
            saved = saved[wrapper]
    scales: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for key, value in saved.items():
        match = _KEY.fullmatch(str(key).removeprefix("module."))
        tensor = describe(value) if match else None
        if match and tensor:
            stage, index, name = match.groups()
            block = f"stage{stage}_block{index}" if index is not None else "stem"
            leaf = read_float32(tensor, f"{where}: {key}").reshape(-1)
            scales.setdefault(block, {})[_OURS[name]] = {"scale": leaf}
    if not scales:
        raise ValueError(
            f"{where}: no scales, such as stage1.0.scale_conv.weight; the keys are "
            f"{first_few(saved)}"
        )
    return scales
