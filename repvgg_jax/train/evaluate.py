"""Metrics over all validation images, during a run or without training."""

import contextlib
import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from repvgg_jax.cluster import consensus
from repvgg_jax.data.batches import eval_batches
from repvgg_jax.data.dataset import Dataset, load
from repvgg_jax.data.sources import Source
from repvgg_jax.data.splits import Subset
from repvgg_jax.progress import Advance, announced, progress, silent
from repvgg_jax.segmentation.task import EXAMPLES
from repvgg_jax.text import differences, plural
from repvgg_jax.train import findings, memory
from repvgg_jax.train.by_class import ByClass
from repvgg_jax.train.classes import for_network, note_other_images
from repvgg_jax.train.experiment import Evaluated, Experiment
from repvgg_jax.train.hooks import StopRequest
from repvgg_jax.train.other_labels import RealLabels, with_class_map
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

logger = logging.getLogger(__name__)

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
      images: numbers of every image of the last evaluation that was asked for them, by name,
        (images,) each, in the order of the data; `mask` is False where one cannot be decoded.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self.picture: Callable[[Any], None] | None = None
        self.images: dict[str, np.ndarray] = {}
        self._steps: dict[tuple[Evaluated, bool], jax.stages.Compiled] = {}

    def __call__(
        self,
        model: Evaluated,
        variables: Any,
        stop: StopRequest | None = None,
        *,
        per_image: bool = False,
        source: Source | None = None,
    ) -> Means | None:
        """The metrics of a network, as the task's `means`.

        Args:
          model: in either form, or the simulation of integers.
          variables: in the same form.
          stop: polled before every batch.
          per_image: also set `images`.
          source: images that take the place of the data's validation images.

        Returns:
          None if `stop` was requested.

        Raises:
          ValueError: none of the images can be decoded, or memory runs out.
        """
        with memory.explained(self._needs, lambda: "less: a smaller batch"):
            return self._evaluate(model, variables, stop, per_image, source)

    def _needs(self) -> str:
        batch, devices = self._experiment.settings.eval.batch_size, self._experiment.mesh.size
        return f"evaluation of config.eval.batch_size={batch} on {plural(devices, 'device')}"

    def _evaluate(
        self,
        model: Evaluated,
        variables: Any,
        stop: StopRequest | None,
        per_image: bool,
        source: Source | None,
    ) -> Means | None:
        dataset = self._experiment.dataset
        if source is not None:
            dataset = dataclasses.replace(dataset, evaluation=source)
        batches = eval_batches(
            dataset,
            batch_size=self._experiment.settings.eval.batch_size,
            sharding=self._experiment.over_batch,
        )
        parts, shown, single = [], None, []
        with self._progress(model, len(dataset.evaluation), alone=per_image) as advance:
            for batch in batches:
                if stop is not None and stop.poll():
                    return None
                sums = self._compiled(model, variables, batch, per_image)(variables, batch)
                examples = sums.pop("examples", None)
                shown = examples if shown is None else shown
                if per_image:
                    single.append(jax.device_get(sums.pop("per_image")))
                parts.append(sums)
                advance(len(batch["mask"]))
        task, classes = self._experiment.task, dataset.classes
        if per_image:
            found = jax.tree.map(lambda *each: np.concatenate(each), *single)
            self.images = {name: each[: len(dataset.evaluation)] for name, each in found.items()}
        self.picture = task.draw(jax.device_get(shown), classes) if shown else None
        return task.means(parts)

    def _progress(
        self, model: Evaluated, total: int, *, alone: bool
    ) -> contextlib.AbstractContextManager[Advance]:
        """Progress of an evaluation without training, which has a live line of its own."""
        if not alone or jax.process_index() > 0:
            return contextlib.nullcontext(silent)
        # A simulation of integers has one form.
        form = "fused" if getattr(model, "deploy", False) else "as trained"
        return progress(f"evaluating {form}", total)

    def _compiled(
        self, model: Evaluated, variables: Any, batch: Any, per_image: bool
    ) -> jax.stages.Compiled:
        key = (model, per_image)
        if key not in self._steps:
            step = EvalStep(
                model,
                self._experiment.task,
                self._experiment.normalize,
                self._experiment.replicated,
                per_image,
            )
            with announced("compiling the evaluation for %dx%d", *batch["image"].shape[1:3]):
                self._steps[key] = jax.jit(step).lower(variables, batch).compile()
            consensus.barrier(f"compiled evaluation {len(self._steps)}")
        return self._steps[key]


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
    return ("" if images == total else f"{images:,} of ") + plural(total, "image")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of evaluating both forms of a network.

    Attributes:
      source: what was evaluated.
      total: number of validation images; `trained["images"]` of them were counted.
      classes: class names, by label.
      trained: means of the training form, as `Evaluator` returns them; `real_accuracy` too if
        sets of labels were given.
      fused: means of the fused form.
      dataset: what it was evaluated on.
      images: numbers of every image by the fused form, as `Evaluator.images`.
      draw_worst: draws the images of the largest loss; None if they need no network to be drawn.
    """

    source: str
    total: int
    classes: tuple[str, ...]
    trained: Means
    fused: Means
    dataset: Dataset
    images: Mapping[str, np.ndarray]
    draw_worst: Callable[[Any], None] | None = None

    def metrics(self, means: Means) -> dict[str, float | None]:
        """The means that are one number, for JSON."""
        found = {name: float(means[name]) for name in scalars(means)}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def write(self, directory: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes `evaluation.json` and pictures, see `repvgg_jax.train.findings`."""
        return findings.write(self, directory)

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
    class_map: str | None = None,
    real_labels: str | None = None,
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
      class_map: how classes of the data become those of the network, see
        `other_labels.with_class_map`.
      real_labels: a file of sets of labels, see `other_labels.RealLabels`: `real_accuracy`.

    Raises:
      ValueError: nothing to evaluate there, another network or head, or other classes.
    """
    settings = dataclasses.replace(
        Settings.from_config(config), init_from=init_from or "", init_entry=init_entry or ""
    )
    consensus.require_same(settings.as_saved())
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
        classes, number = loaded.classes, loaded.weights.num_classes
        if class_map is not None:
            dataset = with_class_map(dataset, class_map, classes, number)
        dataset = for_network(dataset, classes, owner=settings.init_from, other_data=other_data)
        experiment = Experiment.from_config(settings, dataset=dataset, training=False)
        variables, source = _from_weights(experiment, loaded)
    else:
        run = load_run(workdir, step=step)
        if class_map is not None:
            dataset = with_class_map(dataset, class_map, run.classes, len(run.classes))
        dataset = for_network(dataset, run.classes, owner=str(run.path), other_data=other_data)
        note_other_images(dataset, run.metadata, owner=str(run.path))
        experiment = Experiment.from_config(settings, dataset=dataset, training=False)
        variables, source = run.variables, str(run)
    sets = None
    if real_labels is not None:
        if dataset.masks:
            raise ValueError(f"--real_labels is for images, but {dataset.name} has masks")
        sets = RealLabels.read(real_labels, len(dataset.classes))
    return _evaluated(experiment, variables, source, sets)


def _evaluated(
    experiment: Experiment, variables: Any, source: str, sets: RealLabels | None
) -> Evaluation:
    """The evaluation of both forms, with numbers of single images."""
    if experiment.obstacle is not None:
        raise ValueError(
            f"{source} has no deploy form to compare with: {experiment.obstacle}; training ends "
            "with an evaluation of the training form"
        )
    dataset, evaluator = experiment.dataset, Evaluator(experiment)
    deployed = experiment.model.clone(deploy=True)
    # Folded on the host, which says what is wrong with variables that cannot be folded.
    fused_variables = jax.device_put(experiment.model.fuse(variables), experiment.replicated)
    variables = jax.device_put(variables, experiment.replicated)
    trained = evaluator(experiment.model, variables, per_image=True)
    of_trained = evaluator.images
    fused = evaluator(deployed, fused_variables, per_image=True)
    images = evaluator.images
    assert trained is not None
    assert fused is not None
    if sets is not None:
        predicted = of_trained["predicted"], images["predicted"]
        shares, count = sets.accuracy(dataset.evaluation, predicted, images["mask"])
        logger.info("%s has labels of %s", sets.path, plural(count, "image"))
        for means, share in zip((trained, fused), shares, strict=True):
            means["real_accuracy"] = np.asarray(share)
    draw = None
    if dataset.masks and (worst := findings.worst_images(images)):
        shown = Subset(dataset.evaluation, np.asarray(worst[:EXAMPLES]))
        evaluator(deployed, fused_variables, per_image=True, source=shown)
        draw = evaluator.picture
    return Evaluation(
        source, len(dataset.evaluation), dataset.classes, trained, fused, dataset, images, draw
    )


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
