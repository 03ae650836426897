"""Weights to start from, to evaluate or to convert: of a run, a file or the hub.

A run's weights are read from its directory alone; neither its data nor its optimizer is needed.
"""

import dataclasses
import logging
import pathlib
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax.data.dataset import load
from repvgg_jax.data.transforms import EvalTransform
from repvgg_jax.export.description import read_description
from repvgg_jax.model import RepVGG
from repvgg_jax.normalize import Normalize
from repvgg_jax.quantization.qat import measure_norms, split_ranges, with_ranges
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.segmentation.resnet import ResNetVariant
from repvgg_jax.segmentation.weights import Started, load_resnet, start_from_classifier
from repvgg_jax.text import first_few, one_line
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.classes import fit_head
from repvgg_jax.train.experiment import Experiment, Model, build_model
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import TrainState, state_from
from repvgg_jax.train.workdir import RunMetadata, Workdir
from repvgg_jax.variants import Variant
from repvgg_jax.weights import (
    Merged,
    Weights,
    is_pretrained,
    load_file_or_pretrained,
    merge_weights,
)
from repvgg_jax.weights.channels import adapt_channels
from repvgg_jax.weights.tree import head_width

logger = logging.getLogger(__name__)

Step = int | Literal["best", "newest"]
"""Which checkpoint of a run: a step, the best by validation accuracy, or the newest."""


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """The weights of a run, and what using them takes.

    Attributes:
      path: the run directory.
      settings: of the run.
      model: the network in training form, with the dtype that it was trained with.
      variables: `params` and `batch_stats`, NumPy arrays; the averages if the run keeps any.
      step: of the checkpoint.
      metadata: class names, image shapes and normalization.
      accuracy: validation accuracy of the checkpoint; None if it was not evaluated.
      best: step and accuracy of the best evaluated checkpoint, if any was.
      ranges: of activations, by quantization-aware training; None if it was not.
    """

    path: pathlib.Path
    settings: Settings
    model: Model
    variables: dict[str, Any]
    step: int
    metadata: RunMetadata
    accuracy: float | None = None
    best: tuple[int, float] | None = None
    ranges: Any = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.metadata.classes

    @property
    def normalize(self) -> Normalize:
        """Pixels to the network's input."""
        return self.metadata.normalize

    @property
    def eval_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of validation images."""
        return self.metadata.eval_shape

    def __str__(self) -> str:
        return f"step {self.step} of {self.path}"


def parse_step(text: str | None) -> Step:
    """`--step` of the command lines: a number, `best` or `newest`; None is the newest.

    Raises:
      ValueError: anything else.
    """
    if text in (None, "newest"):
        return "newest"
    if text == "best":
        return "best"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--step={text} must be the step of a checkpoint, best or newest")
    return int(text)


def load_run(workdir: Workdir | str | pathlib.Path, *, step: Step = "newest") -> RunWeights:
    """Loads the weights of a run.

    Runs of version 0164ae8 and before have no `metadata.json`; their classes come from the data.

    Args:
      workdir: the run directory.
      step: of the checkpoint; the newest is the newest valid one.

    Raises:
      ValueError: no run or no valid checkpoint there, or classes that are not the network's.
    """
    workdir = workdir if isinstance(workdir, Workdir) else Workdir(pathlib.Path(workdir))
    settings = workdir.read_settings()
    metadata = workdir.read_metadata() or _metadata_from_data(workdir, settings)
    model = build_model(settings, len(metadata.classes))
    with Checkpoints(workdir.checkpoints) as checkpoints:
        best = checkpoints.best()
        wanted = best if step == "best" else None if step == "newest" else step
        if step == "best" and best is None:
            raise ValueError(f"no checkpoint of {workdir.path} was evaluated; give --step newest")
        found, variables = checkpoints.restore_variables(wanted)
        accuracy = checkpoints.accuracy(found)
        of_best = None if best is None else checkpoints.accuracy(best)
    _check_head(workdir, variables, metadata)
    variables, ranges = split_ranges(variables)
    return RunWeights(
        workdir.path,
        settings,
        model,
        variables,
        found,
        metadata,
        accuracy,
        None if best is None or of_best is None else (best, of_best),
        ranges,
    )


def _check_head(workdir: Workdir, variables: Any, metadata: RunMetadata) -> None:
    width = head_width(flatten_dict(variables))
    if width and width != len(metadata.classes):
        raise ValueError(
            f"the network in {workdir.path} has {width} classes, but "
            f"{len(metadata.classes)} are known by name; restore {workdir.metadata} or the data "
            "that the run was trained on"
        )


def run_directory(source: str | pathlib.Path) -> Workdir | None:
    """The run directory at `source`; None for a file, a hub name or a deploy directory."""
    path = pathlib.Path(source)
    return Workdir(path) if path.is_dir() and not (path / "model.safetensors").exists() else None


def check_start(settings: Settings) -> None:
    """Checks, without reading any weights, that there is what a new run starts from.

    Raises:
      ValueError: nothing at `config.init_from`, or a run without a checkpoint; or statistics are
        to be kept that nothing has measured.
    """
    source = settings.init_from
    if not source:
        if settings.bn.freeze_statistics:
            raise ValueError(
                f"config.bn.freeze_statistics={settings.bn.freeze_statistics} keeps statistics of "
                "weights to start from; name them with config.init_from"
            )
        return
    if (workdir := run_directory(source)) is not None:
        workdir.read_settings()
        if not workdir.has_checkpoint:
            raise ValueError(f"{workdir.path} holds no checkpoint yet; train there first")
    elif not is_pretrained(source) and not pathlib.Path(source).exists():
        load_file_or_pretrained(source)  # raises


def starting_state(experiment: Experiment) -> TrainState:
    """The state before the first step: random weights, or those that `config.init_from` names.

    `config.init_from` names a weights file, one of timm's pretrained models, a run directory or
    a deploy directory. The head is replaced if the classes differ, and the stem's kernels are
    adapted if the images have other channels. A segmenter starts from another one, or takes its
    backbone from a classifier.

    Raises:
      ValueError: nothing readable there, or another network.
    """
    source = experiment.settings.init_from
    if experiment.settings.quantize.qat and not source:
        raise ValueError(
            "config.quantize.qat=True trains a network further through its integers; name one "
            "with --init_from, a run directory or a weights file"
        )
    state = experiment.initial_state()
    if not source:
        return state
    loaded = load_source(source, experiment.settings)
    fresh, ranges = split_ranges(jax.device_get(state.variables))
    merged: Merged | Started
    if isinstance(experiment.model, Segmenter) and not loaded.is_segmenter:
        own = _own_variant(experiment)
        merged = start_from_classifier(loaded.weights, fresh, variant=own)
        note = ""
    else:
        weights, note = fit_head(loaded.weights, loaded.classes, experiment.dataset.classes)
        weights = _fit_channels(weights, experiment)
        merged = merge_weights(weights, fresh, variant=_own_variant(experiment))
    logger.info("%s%s (%s)", merged, f"; {note}" if note else "", source)
    if loaded.weights.unused:
        logger.info("left out of %s: %s", source, first_few(loaded.weights.unused))
    variables = merged.variables
    if ranges is not None:
        if loaded.weights.deploy:
            variables = _with_measured_norms(experiment, variables)
        variables = with_ranges(variables, ranges)
    begun = state_from(variables, experiment.optimizer, average=bool(state.ema))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.device_put(begun, shardings)


def _own_variant(experiment: Experiment) -> Variant | None:
    """The network's variant, which knows its blocks; None on a ResNet."""
    variant = experiment.model.variant
    return variant if isinstance(variant, Variant) else None


def _fit_channels(weights: Weights, experiment: Experiment) -> Weights:
    """Weights for images with the channels of the data, see `repvgg_jax.weights.channels`."""
    taken, channels = weights.in_channels, experiment.dataset.image_shape[-1]
    variant = experiment.settings.model.variant
    if taken == channels or not isinstance(experiment.model, RepVGG):
        return weights
    assert isinstance(variant, Variant)
    arrays = adapt_channels(
        flatten_dict(weights.variables),
        variant,
        deploy=weights.deploy,
        taken=taken,
        channels=channels,
    )
    logger.info("the stem's kernels are adapted from images of %d channels to %d", taken, channels)
    return dataclasses.replace(weights, variables=unflatten_dict(arrays), in_channels=channels)


def starting_weights(experiment: Experiment, loaded: "Loaded") -> Merged:
    """Weights from elsewhere, merged into the network of an experiment as they are.

    Raises:
      ValueError: another network.
    """
    if isinstance(experiment.model, Segmenter) and not loaded.is_segmenter:
        raise ValueError(
            f"{experiment.settings.init_from} is a classifier, which has no class per pixel; "
            "train it as a segmenter first, with --init_from"
        )
    fresh, _ = split_ranges(jax.device_get(experiment.initial_state().variables))
    return merge_weights(loaded.weights, fresh, variant=_own_variant(experiment))


def _with_measured_norms(experiment: Experiment, variables: dict[str, Any]) -> dict[str, Any]:
    """Unfused variables with the statistics of training images, for the same function."""
    dataset = experiment.dataset
    count = min(len(dataset.train), experiment.settings.eval.batch_size)
    transform = EvalTransform(dataset.train, dataset.eval_crop, dataset.eval_shape)
    elements = [transform(number)[0] for number in range(count)]
    images = np.stack([element["image"] for element in elements if element["mask"]])
    logger.info("batch normalization inserted: statistics of %d training images", len(images))
    return measure_norms(experiment.model, variables, experiment.normalize(images))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights from elsewhere.

    Attributes:
      weights: of either form.
      classes: names by label; empty if the source does not tell.
    """

    weights: Weights
    classes: tuple[str, ...]

    @property
    def is_segmenter(self) -> bool:
        """Whether they are a segmenter's: a backbone and more."""
        return "backbone" in self.weights.variables.get("params", {})


def load_source(source: str, settings: Settings) -> Loaded:
    """What `config.init_from` and `config.init_entry` name.

    Raises:
      ValueError: nothing readable there, or another network than that of the settings.
    """
    path, entry = pathlib.Path(source), settings.init_entry or None
    variant = settings.model.variant
    workdir = run_directory(path)
    if entry is not None and path.is_dir():
        raise ValueError(
            f"config.init_entry={entry!r} is for checkpoint files, but {source} is a directory"
        )
    if workdir is not None:
        run = load_run(workdir)
        weights = Weights(
            variant=run.model.variant.name,
            deploy=False,
            variables=run.variables,
            num_classes=run.model.num_classes,
            family="flax",
            in_channels=run.metadata.image_shape[-1],
        )
        return Loaded(weights, run.classes)
    if isinstance(variant, ResNetVariant):
        return Loaded(load_resnet(source, variant=variant.name), ())
    file = path / "model.safetensors" if path.is_dir() else path
    description = read_description(file)
    own = None if description is None else description.variant
    try:
        weights = load_file_or_pretrained(str(file), variant=variant, entry=entry)
    except ValueError as error:
        if own is None or own == variant:
            raise
        raise ValueError(
            f"{file} is of {own.name}, but config.model.variant is {variant.name}; give its recipe "
            f"with --config ({one_line(error)})"
        ) from error
    return Loaded(weights, () if description is None else description.labels)


def _metadata_from_data(workdir: Workdir, settings: Settings) -> RunMetadata:
    logger.info(
        "%s was written by an older version (no metadata.json): taking the classes from %s",
        workdir.path,
        settings.data.source,
    )
    dataset = load(settings.data)
    return RunMetadata(
        classes=dataset.classes,
        image_shape=dataset.image_shape,
        eval_shape=dataset.eval_shape,
        normalize=Normalize(settings.data.mean, settings.data.std),
    )
