"""Evaluating without training: a run, a weights file or a published network, in both forms."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from repvgg_jax.cluster import consensus
from repvgg_jax.reparam import fuse_params
from repvgg_jax.text import differences
from repvgg_jax.train import config as configs
from repvgg_jax.train.evaluation import Evaluation, counted, scalars
from repvgg_jax.train.optimizer import make_optimizer
from repvgg_jax.train.run import Run
from repvgg_jax.train.start import starting_weights
from repvgg_jax.train.trained import run_directory, trained_state
from repvgg_jax.train.workdir import Workdir

# Settings that what is evaluated depends on; the others may change for an evaluation.
_OF_THE_NETWORK = ("config.model.variant", "config.ema")


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What an evaluation found.

    Attributes:
      source: what was evaluated.
      held_out: images that there are; `trained["images"]` of them were counted.
      classes: their names, by label.
      trained: means of the training form, as `Evaluation` gives them.
      fused: means of the fused form.
    """

    source: str
    held_out: int
    classes: tuple[str, ...]
    trained: dict[str, np.ndarray]
    fused: dict[str, np.ndarray]

    def lines(self, *, by_class: bool = False) -> list[str]:
        """A table for people."""
        lines = [
            f"{self.source}: {counted(self.trained, self.held_out)}",
            f"{'':24}{'as trained':>12}{'fused':>12}",
        ]
        lines += [
            f"{name:24}{self.trained[name]:12.4f}{self.fused[name]:12.4f}"
            for name in scalars(self.trained)
        ]
        if by_class:
            trained, fused = self.trained["class_accuracy"], self.fused["class_accuracy"]
            lines += [
                f"{name[:23]:24}{trained[label]:12.4f}{fused[label]:12.4f}"
                for label, name in enumerate(self.classes)
            ]
        return lines


def assess(
    config: ConfigDict,
    path: str | pathlib.Path,
    *,
    init_from: str | None = None,
    step: int | None = None,
) -> Assessment:
    """Evaluates a network on the held-out images of `config`, in both forms.

    Args:
      config: names the network and the data. What it starts from, `config.init_from`, is no
        part of the question.
      path: a run's directory; not looked at where `init_from` says what to evaluate.
      init_from: another run's directory, a converted one, a weights file or a hub name.
      step: of the run's checkpoint; None for the newest.

    Raises:
      ValueError: nothing to evaluate there, or another network or head.
    """
    consensus.require_same({**configs.plain(config), "--init_from": init_from})
    configs.check(config, devices=jax.device_count(), processes=jax.process_count())
    workdir = run_directory(init_from) if init_from else Workdir(pathlib.Path(path))
    if workdir is None and step is not None:
        raise ValueError(f"--step={step} is that of a run's checkpoint, and {init_from} is no run")
    stored = None if workdir is None else workdir.read_config()  # before any data are looked at
    consensus.announce(batch_size=config.eval.batch_size)
    run = Run.from_config(config)
    if workdir is None or stored is None:
        variables, source = _from_weights(run, str(init_from))
    else:
        variables, source = _from_run(run, workdir, stored, step)
    evaluate = Evaluation(run)
    trained = evaluate(run.model, variables)
    fused = evaluate(run.model.clone(deploy=True), fuse_params(variables))
    assert trained is not None
    assert fused is not None
    return Assessment(source, len(run.dataset.evaluation), run.dataset.classes, trained, fused)


def _from_weights(run: Run, source: str) -> tuple[Any, str]:
    merged = starting_weights(run, source)
    if missing := [name for name in merged.replaced if not name.startswith("aux_")]:
        raise ValueError(
            f"{source} has no {', '.join(missing)} for the {len(run.dataset.classes)} "
            f"classes of {run.dataset.name}; evaluate it on data with its own classes, or "
            "fine-tune it first"
        )
    return jax.device_put(merged.variables, run.replicated), merged.source


def _from_run(run: Run, workdir: Workdir, stored: ConfigDict, step: int | None) -> tuple[Any, str]:
    changed = [
        line
        for line in differences(configs.plain(stored), configs.plain(run.config))
        if line.startswith(_OF_THE_NETWORK)
    ]
    if changed:
        raise ValueError(
            f"{workdir.path} holds a run of another network: {'; '.join(changed)}; give the "
            "--config that the run began with"
        )
    # The state was saved with the optimiser's, and which one that was changes no accuracy.
    optimizer = make_optimizer(
        stored.optimizer,
        batch_size=run.config.train.batch_size,
        steps_per_epoch=run.steps_per_epoch,
        total_steps=run.total_steps,
    )
    state = trained_state(workdir, dataclasses.replace(run, optimizer=optimizer), step=step)
    return state.result, f"step {int(state.step)} of {workdir.path}"
