"""Where a run starts: from random weights, or from somebody's trained ones."""

import pathlib

import jax
import numpy as np

from repvgg_jax.train.run import Run
from repvgg_jax.train.state import TrainState, state_from
from repvgg_jax.train.trained import run_directory, trained_state
from repvgg_jax.train.workdir import Workdir
from repvgg_jax.weights import (
    Merged,
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
    merged = starting_weights(run, source, state)
    begun = state_from(merged.variables, run.optimizer, average=bool(state.ema))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.device_put(begun, shardings), f"{merged} ({source})"


def starting_weights(run: Run, source: str, state: TrainState | None = None) -> Merged:
    """Somebody's weights, put into the network of a run.

    Args:
      run: whose network.
      source: as `config.init_from`.
      state: its initial state, if there is one already.

    Raises:
      ValueError: nothing readable there, or another network.
    """
    fresh = run.initial_state() if state is None else state
    return merge_weights(_load(run, source), jax.device_get(fresh.variables))


def _load(run: Run, source: str) -> Weights:
    if workdir := run_directory(source):
        return _load_run(workdir)
    if (path := pathlib.Path(source)).is_dir():
        return load_weights(path / "model.safetensors", variant=run.model.variant)
    return load_file_or_pretrained(source, variant=run.model.variant)


def _load_run(workdir: Workdir) -> Weights:
    run = Run.from_config(workdir.read_config())
    state = trained_state(workdir, run)
    return Weights(
        variant=run.model.variant.name,
        deploy=False,
        variables=jax.tree.map(np.asarray, state.result),
        num_classes=run.model.num_classes,
        family="flax",
    )
