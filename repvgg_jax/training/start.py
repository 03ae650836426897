"""Where a run starts: from random weights, or from somebody's trained ones."""

import pathlib

import jax
import numpy as np

from repvgg_jax.training.checkpoint import Checkpoints
from repvgg_jax.training.run import Run
from repvgg_jax.training.state import TrainState, state_from
from repvgg_jax.training.workdir import Workdir
from repvgg_jax.weights import (
    Weights,
    load_file_or_pretrained,
    load_weights,
    merge_weights,
)


def starting_state(run: Run) -> tuple[TrainState, str | None]:
    """The state before the first step, and what to say of where it comes from.

    `config.init_from` names a checkpoint file, one of timm's pretrained models, the workdir of
    another run or a directory that `convert.py` wrote. The head is replaced where the classes
    differ.

    Raises:
      ValueError: nothing readable there, or another network.
    """
    state, source = run.initial_state(), run.config.init_from
    if not source:
        return state, None
    merged = merge_weights(_load(run, source), jax.device_get(state.variables))
    begun = state_from(merged.variables, run.optimizer, average=bool(state.ema))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.device_put(begun, shardings), f"{merged} ({source})"


def _load(run: Run, source: str) -> Weights:
    path = pathlib.Path(source)
    if path.is_dir():
        converted = path / "model.safetensors"
        if converted.exists():
            return load_weights(converted, variant=run.model.variant)
        return _load_run(Workdir(path))
    return load_file_or_pretrained(source, variant=run.model.variant)


def _load_run(workdir: Workdir) -> Weights:
    run = Run.from_config(workdir.read_config())
    with Checkpoints(workdir.checkpoints) as checkpoints:
        state = checkpoints.restore(run.abstract_state())
    if state is None:
        raise ValueError(f"{workdir.path} holds no checkpoint to start from")
    return Weights(
        variant=run.model.variant.name,
        deploy=False,
        variables=jax.tree.map(np.asarray, state.result),
        num_classes=run.model.num_classes,
        family="flax",
    )
