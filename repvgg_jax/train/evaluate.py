"""Metrics over all validation images, during a run or without training."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from repvgg_jax.cluster import consensus
from repvgg_jax.data.batches import eval_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.text import differences, plural
from repvgg_jax.train import memory
from repvgg_jax.train.by_class import ByClass
from repvgg_jax.train.classes import for_network, note_other_images
from repvgg_jax.train.experiment import Experiment, Model
from repvgg_jax.train.hooks import StopRequest
from repvgg_jax.train.restore import (
    Loaded,
    Step,
    load_run,
    load_source,
    run_directory,
    starting_weights,
)
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.step import EvalStep, Means
from repvgg_jax.train.validate import check_batches
from repvgg_jax.train.workdir import Workdir

# Settings that the evaluated network depends on; the others may differ from the run's.
_OF_THE_NETWORK = (
    "config.model.variant",
    "config.ema",
    "config.task",
    "config.segmentation.fast",
    "config.segmentation.output_stride",
    "config.segmentation.bins",
    "config.segmentation.width",
)


class Evaluator:
    """Evaluates networks on the validation images of an experiment; compiles each form once.

    Attributes:
      picture: draws examples of the last evaluation to a file; None if there is nothing to draw.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self.picture: Callable[[Any], None] | None = None
        self._steps: dict[Model, jax.stages.Compiled] = {}

    def __call__(
        self, model: Model, variables: Any, stop: StopRequest | None = None
    ) -> Means | None:
        """The metrics of a network, as the task's `means`.

        Args:
          model: in either form.
          variables: in the same form.
          stop: polled before every batch.

        Returns:
          None if `stop` was requested.

        Raises:
          ValueError: none of the images can be decoded, or memory runs out.
        """
        with memory.explained(self._needs, lambda: "less: a smaller batch"):
            return self._evaluate(model, variables, stop)

    def _needs(self) -> str:
        batch, devices = self._experiment.settings.eval.batch_size, self._experiment.mesh.size
        return f"evaluation of config.eval.batch_size={batch} on {plural(devices, 'device')}"

    def _evaluate(self, model: Model, variables: Any, stop: StopRequest | None) -> Means | None:
        batches = eval_batches(
            self._experiment.dataset,
            batch_size=self._experiment.settings.eval.batch_size,
            sharding=self._experiment.over_batch,
        )
        parts, shown = [], None
        for batch in batches:
            if stop is not None and stop.poll():
                return None
            sums = self._compiled(model, variables, batch)(variables, batch)
            examples = sums.pop("examples", None)
            shown = examples if shown is None else shown
            parts.append(sums)
        task, classes = self._experiment.task, self._experiment.dataset.classes
        self.picture = task.draw(jax.device_get(shown), classes) if shown else None
        return task.means(parts)

    def _compiled(self, model: Model, variables: Any, batch: Any) -> jax.stages.Compiled:
        if model not in self._steps:
            step = EvalStep(
                model,
                self._experiment.task,
                self._experiment.normalize,
                self._experiment.replicated,
            )
            self._steps[model] = jax.jit(step).lower(variables, batch).compile()
            consensus.barrier(f"compiled evaluation {len(self._steps)}")
        return self._steps[model]


def scalars(means: Means) -> list[str]:
    """Names of the means that are one number for all images."""
    return [name for name, value in means.items() if np.ndim(value) == 0 and name != "images"]


def metrics_row(prefix: str, means: Means, suffix: str = "") -> dict[str, float]:
    """The means as a row of the metrics: `{"eval/accuracy": 0.7, …}`."""
    return {f"{prefix}/{name}{suffix}": float(means[name]) for name in scalars(means)}


def counted(means: Means, total: int) -> str:
    """The number of images that were counted, in words.

    Args:
      means: as `Evaluator` returns them.
      total: number of images, including those that cannot be decoded.
    """
    images = int(means["images"])
    return f"{images:,} images" if images == total else f"{images:,} of {total:,} images"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of evaluating both forms of a network.

    Attributes:
      source: what was evaluated.
      total: number of validation images; `trained["images"]` of them were counted.
      classes: class names, by label.
      trained: means of the training form, as `Evaluator` returns them.
      fused: means of the fused form.
    """

    source: str
    total: int
    classes: tuple[str, ...]
    trained: Means
    fused: Means

    def lines(self, *, by_class: bool = False) -> list[str]:
        """A table.

        Args:
          by_class: also the accuracy of each class, or its IoU.
        """
        lines = [
            f"{self.source}: {counted(self.trained, self.total)}",
            f"{'':24}{'as trained':>12}{'fused':>12}",
        ]
        lines += [
            f"{name:24}{self.trained[name]:12.4f}{self.fused[name]:12.4f}"
            for name in scalars(self.trained)
        ]
        found = ByClass.of(self.classes, self.fused)
        trained = ByClass.of(self.classes, self.trained)
        lines.append(f"lowest by class, fused: {found.line()}")
        if by_class:
            lines += [
                f"{name[:23]:24}{trained.score[label]:12.4f}{found.score[label]:12.4f}"
                for label, name in enumerate(self.classes)
            ]
        return lines


def evaluate_only(
    config: ConfigDict | Settings,
    path: str | pathlib.Path,
    *,
    init_from: str | None = None,
    init_entry: str | None = None,
    step: Step = "newest",
    other_data: bool = False,
) -> Evaluation:
    """Evaluates a network on the validation images of `config`, in both forms.

    Args:
      config: names the network and the data. Its own `init_from` is ignored: a run is not what
        it started from.
      path: a run directory; ignored if `init_from` is given.
      init_from: another run directory, a deploy directory, a weights file or a hub name.
      init_entry: of a weights file that holds several state dicts.
      step: of the run's checkpoint.
      other_data: accept data with other classes, or with some of them, matched by name.

    Raises:
      ValueError: nothing to evaluate there, another network or head, or other classes.
    """
    settings = dataclasses.replace(
        Settings.from_config(config), init_from=init_from or "", init_entry=init_entry or ""
    )
    consensus.require_same(settings.as_json())
    check_batches(settings, devices=jax.device_count(), processes=jax.process_count())
    workdir = run_directory(init_from) if init_from else Workdir(pathlib.Path(path))
    if workdir is None and step != "newest":
        raise ValueError(f"--step={step} needs a run, and {init_from} is not a run directory")
    if workdir is not None:
        _check_same_network(settings, workdir)  # before any data are read
    consensus.announce(batch_size=settings.eval.batch_size)
    dataset = load(settings.data, training=False)
    if workdir is None:
        loaded = load_source(settings.init_from, settings)
        dataset = for_network(
            dataset, loaded.classes, owner=settings.init_from, other_data=other_data
        )
        experiment = Experiment.from_config(settings, dataset=dataset, training=False)
        variables, source = _from_weights(experiment, loaded)
    else:
        run = load_run(workdir, step=step)
        dataset = for_network(dataset, run.classes, owner=str(run.path), other_data=other_data)
        note_other_images(dataset, run.metadata, owner=str(run.path))
        experiment = Experiment.from_config(settings, dataset=dataset, training=False)
        variables, source = run.variables, str(run)
    variables = jax.device_put(variables, experiment.replicated)
    evaluator = Evaluator(experiment)
    trained = evaluator(experiment.model, variables)
    if experiment.obstacle is not None:
        raise ValueError(
            f"{source} has no deploy form to evaluate beside: {experiment.obstacle}; the end of "
            "its training evaluates it as it is"
        )
    fused = evaluator(experiment.model.clone(deploy=True), experiment.model.fuse(variables))
    assert trained is not None
    assert fused is not None
    return Evaluation(source, len(dataset.evaluation), dataset.classes, trained, fused)


def _check_same_network(settings: Settings, workdir: Workdir) -> None:
    stored = workdir.read_settings()
    changed = [
        line
        for line in differences(stored.as_json(), settings.as_json())
        if line.startswith(_OF_THE_NETWORK)
    ]
    if changed:
        raise ValueError(
            f"{workdir.path} holds a run of another network: {'; '.join(changed)}; give the "
            "--config that the run started with"
        )


def _from_weights(experiment: Experiment, loaded: Loaded) -> tuple[Any, str]:
    source = experiment.settings.init_from
    merged = starting_weights(experiment, loaded)
    if missing := [name for name in merged.replaced if not name.startswith("aux_")]:
        raise ValueError(
            f"{source} has no {', '.join(missing)} for the {len(experiment.dataset.classes)} "
            f"classes of {experiment.dataset.name}; evaluate it on data with its own classes, or "
            "fine-tune it first"
        )
    return merged.variables, merged.source
