"""The blocks of a network that a command line names."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from repvgg_jax.convert.deployed import Deployment, load_deployed
from repvgg_jax.convert.metadata import is_deployment
from repvgg_jax.convert.source import from_weights
from repvgg_jax.text import one_line
from repvgg_jax.train.experiment import network_title
from repvgg_jax.train.restore import load_run, parse_step
from repvgg_jax.visualize.kernels import BlockKernels, inspect_blocks

logger = logging.getLogger(__name__)

Named = tuple[str, list[BlockKernels]]


def blocks_of(name: str, step: str | None = None) -> Named:
    """A title, and the blocks of a run, a deploy directory, a checkpoint file or a hub name.

    A deploy directory names what it was converted from. If that is still there, and computes the
    same kernels, its branches are shown; otherwise the fused kernels alone, and a warning says why.

    Args:
      name: the path or hub name.
      step: of a run: the checkpoint, as `--step` of the commands.

    Raises:
      ValueError: there is no such network, or a step of something that has none.
    """
    path = pathlib.Path(name)
    is_run = path.is_dir() and not is_deployment(path)
    if step is not None and not is_run:
        raise ValueError(f"--step={step} is for a run directory; --model={name} has no steps")
    if is_run:
        return _of_run(path, step)
    if is_deployment(path):
        return _of_deployment(path)
    return _of_weights(name)


def _of_run(path: pathlib.Path, step: str | None) -> Named:
    run = load_run(path, step=parse_step(step))
    title = f"{network_title(run.model)}, step {run.step} of {path}"
    return title, _inspect(run.model, run.variables, run.metadata.eval_shape)


def _of_weights(name: str) -> Named:
    source = from_weights(name)
    height, width, channels = source.images.shape[1:]
    return source.title, _inspect(source.model, source.variables, (height, width, channels))


def _of_deployment(path: pathlib.Path) -> Named:
    deployed = load_deployed(path)
    fused = _inspect(deployed.model, deployed.variables, deployed.metadata["image_shape"])
    title = f"{network_title(deployed.model)} of {path}"
    try:
        source, blocks = _source_of(deployed)
        _check_same(blocks, fused)
    except (OSError, ValueError) as error:
        logger.warning(
            "the branches of %s cannot be shown, only its fused kernels: %s",
            path,
            one_line(error, 300),
        )
        return title, fused
    return f"{title}, from {source}", blocks


def _source_of(deployed: Deployment) -> Named:
    """What a deploy directory was converted from.

    Raises:
      ValueError: it is not there.
    """
    source: Mapping[str, Any] = deployed.metadata.get("source") or {}
    if isinstance(run := source.get("workdir"), str):
        return _of_run(pathlib.Path(run), str(source["step"]) if "step" in source else None)
    if isinstance(weights := source.get("weights"), str) and pathlib.Path(weights).exists():
        return _of_weights(weights)
    raise ValueError("what it was converted from is not there")


def _check_same(blocks: list[BlockKernels], fused: list[BlockKernels]) -> None:
    """Raises ValueError unless the kernels are those of the deploy directory."""
    if [block.name for block in blocks] != [block.name for block in fused] or not all(
        one.shown.shape == other.shown.shape
        and np.allclose(one.norm, other.norm, rtol=1e-4)
        and np.allclose(one.taps, other.taps, atol=1e-4)
        for one, other in zip(blocks, fused, strict=True)
    ):
        raise ValueError("what it was converted from has other weights by now")


def _inspect(model: Any, variables: Any, shape: Any) -> list[BlockKernels]:
    images = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return inspect_blocks(model, variables, images)
