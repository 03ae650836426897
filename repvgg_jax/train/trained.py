"""What a run has trained so far, for those who start from it, evaluate it or convert it."""

import pathlib

from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.run import Run
from repvgg_jax.train.state import TrainState
from repvgg_jax.train.workdir import Workdir


def trained_state(
    workdir: Workdir,
    run: Run,
    *,
    step: int | None = None,
) -> TrainState:
    """The state of the newest sound checkpoint in a run's directory.

    Args:
      workdir: of the run.
      run: whose network and optimiser are those of the checkpoint.
      step: of another checkpoint than the newest.

    Raises:
      ValueError: no sound checkpoint there, or that of another network or optimiser.
    """
    with Checkpoints(workdir.checkpoints) as checkpoints:
        state = checkpoints.restore(run.abstract_state(), step=step)
    if state is None:
        raise ValueError(f"{workdir.path} holds no checkpoint yet; train there first")
    return state


def run_directory(source: str | pathlib.Path) -> Workdir | None:
    """The run's directory that this is; None where it is a file, a hub name or converted."""
    path = pathlib.Path(source)
    return Workdir(path) if path.is_dir() and not (path / "model.safetensors").exists() else None
