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

from repvgg_jax.data.dataset import EvalTransform, load
from repvgg_jax.data.identity import SplitIdentity
from repvgg_jax.data.masks import is_cityscapes, is_pairs
from repvgg_jax.data.records import MANIFEST
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.data.sources import photo_crops
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

logger = logging.getLogger(__name__)

Step = int | Literal["best", "newest"]
"""Which checkpoint of a run: that of a step, of the best validation accuracy, or the newest."""


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
    head = variables["params"].get("head")
    if head is not None and head["kernel"].shape[-1] != len(metadata.classes):
        raise ValueError(
            f"the network in {workdir.path} has {head['kernel'].shape[-1]} classes, but "
            f"{len(metadata.classes)} are known by name; restore {workdir.metadata} or the data "
            "that the run was trained on"
        )


def validation_images(
    run: RunWeights, count: int, *, data: str | None = None
) -> tuple[np.ndarray, str]:
    """Real images of the shape that a run's network is evaluated on.

    The run's own validation images if its data are there, else crops of the built-in
    photographs, in gray for a single channel.

    Args:
      run: whose images.
      count: largest number of images.
      data: where to take them from instead, see `data_images`; they must be there.

    Returns:
      uint8 (images, height, width, channels), and what they are, e.g.
      `360 validation images of digits`.

    Raises:
      ValueError: no data, and a number of channels that photographs do not have; or `data` is
        not there, or has images of another shape.
    """
    settings = run.settings.data
    if data is not None:
        return data_images(data, settings, run.eval_shape, count)
    try:
        dataset = load(settings, training=False)
        images = dataset.evaluation_images(count)
    except (ImportError, OSError, ValueError) as error:  # only training needs some libraries
        images, what = photographs(run.eval_shape)
        return images, f"{what} (no {settings.source}: {one_line(error)})"
    text = f"{len(images):,} validation images of {settings.source}"
    if images.shape[1:] != run.eval_shape:
        images, what = photographs(run.eval_shape)
        return images, f"{what} (those of {settings.source} have another shape)"
    known = run.metadata.data
    now = SplitIdentity.of(dataset.evaluation, len(dataset.classes))
    if known and (difference := known.evaluation.difference(now, run.classes)):
        text += f" (not those of the run: {difference})"
    return images, text


def data_images(
    data: str, settings: DataSettings, shape: tuple[int, int, int], count: int
) -> tuple[np.ndarray, str]:
    """The first validation images of a data set, and what they are.

    Args:
      data: as `config.data.source`, or a directory: of records, of Cityscapes, of images and masks,
        or of a folder per class, with or without `val` above them.
      settings: how to read them.
      shape: (height, width, channels) that they must have.
      count: largest number of images.

    Raises:
      ValueError: it is not there, or has images of another shape.
    """
    settings = data_settings(data, settings)
    images = load(settings, training=False).evaluation_images(count)
    if images.shape[1:] != shape:
        raise ValueError(
            f"images of {settings.source} have the shape {images.shape[1:]}, but the network "
            f"takes {shape}"
        )
    return images, f"{len(images):,} validation images of {settings.source}"


def data_settings(data: str, settings: DataSettings) -> DataSettings:
    """The settings that read another data set like a run's own.

    Args:
      data: as for `data_images`.
      settings: of the run.
    """
    path = pathlib.Path(data)
    if path.is_dir():
        known = {
            "records": (path / MANIFEST).is_file(),
            "cityscapes": is_cityscapes(path),
            "masks": is_pairs(path),
        }
        data = f"{next((kind for kind, holds in known.items() if holds), 'folder')}:{data}"
        below = any((path / split).is_dir() for split in ("val", "validation"))
        settings = dataclasses.replace(settings, eval_split="validation" if below else ".")
    if not (settings.mask and data.startswith("tfds:")):
        settings = dataclasses.replace(settings, mask="", num_classes=0)
    return dataclasses.replace(settings, source=data, holdout=0.0)


def photographs(shape: tuple[int, int, int]) -> tuple[np.ndarray, str]:
    """Crops of the built-in photographs, in gray for a single channel, and what they are.

    Raises:
      ValueError: a number of channels that they do not have.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise ValueError(
            f"the network takes images of {channels} channels, but the built-in photographs have "
            "1 or 3; give images with --data, or convert the run where its data are"
        )
    images = photo_crops(max(height, width))[:, :height, :width]
    if channels == 1:
        images = images.mean(-1, keepdims=True).round().astype(np.uint8)
    return images, f"{len(images)} crops of built-in photographs"


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
        merged, note = start_from_classifier(loaded.weights, fresh), ""
    else:
        weights, note = fit_head(loaded.weights, loaded.classes, experiment.dataset.classes)
        weights = _fit_channels(weights, experiment)
        variant = experiment.model.variant
        own = variant if isinstance(variant, Variant) else None
        merged = merge_weights(weights, fresh, variant=own)
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
    return merge_weights(loaded.weights, fresh)


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
    weights = load_file_or_pretrained(str(file), variant=variant, entry=entry)
    description = read_description(file)
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
