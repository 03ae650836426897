"""Scales of RepOptimizers for a run: found by another run, or in a file; kept with the run.

A run trains with the scales that it started with, which are in its directory, whatever becomes of
the run or file that `config.optimizer.scales` names.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax import files
from repvgg_jax.reparam import extract_scales, repopt_search
from repvgg_jax.text import one_line
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.workdir import Workdir
from repvgg_jax.weights import load_scales

FILE = "scales.safetensors"

Scales = Mapping[str, Any]
"""`{"stage1_block0": {"scale_3x3": {"scale": …}, …}, …}`, float32 NumPy arrays."""


def read_scales(source: str) -> Scales:
    """The scales that `config.optimizer.scales` names.

    Args:
      source: the directory of a run of a network such as `repopt_b1_search`, or a file of the
        authors', e.g. `RepOpt-VGG-B1-scales.pth`.

    Raises:
      ValueError: nothing readable there, or a run of another network.
    """
    path = pathlib.Path(source)
    if not path.is_dir():
        return load_scales(source)
    workdir = Workdir(path)
    variant = workdir.read_settings().model.variant.name
    with Checkpoints(workdir.checkpoints) as checkpoints:
        _, variables = checkpoints.restore_variables()
    try:
        return jax.tree.map(np.asarray, extract_scales(repopt_search(), variables["params"]))
    except ValueError as error:
        raise ValueError(
            f"config.optimizer.scales={source}: {error}; it is a run of {variant}, give one of a "
            "network such as repopt_b1_search"
        ) from error


def of_run(workdir: Workdir) -> Scales | None:
    """The scales that a run started with; None if it has none.

    Raises:
      ValueError: they cannot be read.
    """
    path = workdir.path / FILE
    if not path.exists():
        return None
    try:
        return unflatten_dict(safetensors.numpy.load_file(path), sep="/")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error


def keep(scales: Scales, workdir: Workdir) -> None:
    """Writes the scales into the directory of the run that trains with them, atomically."""
    content = {
        name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(scales, sep="/").items()
    }
    with files.replacing(workdir.path / FILE) as temporary:
        safetensors.numpy.save_file(content, temporary)
