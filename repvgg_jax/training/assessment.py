"""Evaluating without training: a run, a weights file or a published network, in both forms."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from repvgg_jax.fuse import fuse_params
from repvgg_jax.training import config as configs
from repvgg_jax.training import distributed
from repvgg_jax.training.checkpoint import Checkpoints
from repvgg_jax.training.evaluation import Evaluation
from repvgg_jax.training.run import Run
from repvgg_jax.training.start import starting_weights
from repvgg_jax.training.workdir import Workdir

# Settings that a checkpoint's state depends on; the others may change for an evaluation.
_OF_THE_STATE = ("config.model.variant", "config.optimizer.name", "config.ema")


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What an evaluation found.

    Attributes:
      source: what was evaluated.
      images: how many.
      classes: their names, by label.
      trained: means of the training form, as `Evaluation` gives them.
      fused: means of the fused form.
    """

    source: str
    images: int
    classes: tuple[str, ...]
    trained: dict[str, np.ndarray]
    fused: dict[str, np.ndarray]

    def lines(self, *, by_class: bool = False) -> list[str]:
        """A table for people."""
        names = [name for name, value in self.trained.items() if np.ndim(value) == 0]
        lines = [
            f"{self.source}: {self.images:,} images",
            f"{'':24}{'as trained':>12}{'fused':>12}",
        ]
        lines += [f"{name:24}{self.trained[name]:12.4f}{self.fused[name]:12.4f}" for name in names]
        if by_class:
            trained, fused = self.trained["class_accuracy"], self.fused["class_accuracy"]
            lines += [
                f"{name[:23]:24}{trained[label]:12.4f}{fused[label]:12.4f}"
                for label, name in enumerate(self.classes)
            ]
        return lines


def assess(config: ConfigDict, path: str | pathlib.Path, *, step: int | None = None) -> Assessment:
    """Evaluates a network on the held-out images of `config`, in both forms.

    Args:
      config: names the network, the data and perhaps `init_from`.
      path: a run's directory; not looked at where `config.init_from` says what to evaluate.
      step: of the run's checkpoint; None for the newest.

    Raises:
      ValueError: nothing to evaluate there, or another network or head.
    """
    distributed.require_same(configs.plain(config))
    configs.check(config, devices=jax.device_count(), processes=jax.process_count())
    distributed.announce(batch_size=config.eval.batch_size)
    run = Run.from_config(config)
    if config.init_from:
        variables, source = _from_weights(run)
    else:
        variables, source = _from_run(run, Workdir(pathlib.Path(path)), step)
    evaluate = Evaluation(run)
    trained = evaluate(run.model, variables)
    fused = evaluate(run.model.clone(deploy=True), fuse_params(variables))
    assert trained is not None
    assert fused is not None
    return Assessment(source, len(run.dataset.evaluation), run.dataset.classes, trained, fused)


def _from_weights(run: Run) -> tuple[Any, str]:
    merged = starting_weights(run)
    if missing := [name for name in merged.replaced if not name.startswith("aux_")]:
        raise ValueError(
            f"{run.config.init_from} has no {', '.join(missing)} for the "
            f"{len(run.dataset.classes)} "
            f"classes of {run.dataset.name}; evaluate it on data with its own classes, or "
            "fine-tune it first"
        )
    return jax.device_put(merged.variables, run.replicated), merged.source


def _from_run(run: Run, workdir: Workdir, step: int | None) -> tuple[Any, str]:
    stored = workdir.read_config()
    changed = [
        line
        for line in configs.differences(configs.plain(stored), configs.plain(run.config))
        if line.startswith(_OF_THE_STATE)
    ]
    if changed:
        raise ValueError(
            f"{workdir.path} holds a run of another network: {'; '.join(changed)}; give the "
            "--config that the run began with"
        )
    with Checkpoints(workdir.checkpoints) as checkpoints:
        state = checkpoints.restore(run.abstract_state(), step=step)
    if state is None:
        raise ValueError(f"{workdir.path} holds no checkpoint to evaluate")
    return state.result, f"step {int(state.step)} of {workdir.path}"
