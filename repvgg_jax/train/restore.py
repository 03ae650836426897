"""Weights to start from, to evaluate or to convert: of a run, a file or the hub.

A run's weights are read from its directory alone; neither its data nor its optimizer is needed.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from repvgg_jax.data.dataset import load
from repvgg_jax.data.sources import photo_crops
from repvgg_jax.model import RepVGG
from repvgg_jax.normalize import Normalize
from repvgg_jax.text import one_line
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.experiment import Experiment, build_model
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import TrainState, state_from
from repvgg_jax.train.workdir import RunMetadata, Workdir
from repvgg_jax.weights import (
    PRETRAINED,
    Merged,
    Weights,
    load_file_or_pretrained,
    load_weights,
    merge_weights,
)

logger = logging.getLogger(__name__)


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
    """

    path: pathlib.Path
    settings: Settings
    model: RepVGG
    variables: dict[str, Any]
    step: int
    metadata: RunMetadata

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


def load_run(workdir: Workdir | str | pathlib.Path, *, step: int | None = None) -> RunWeights:
    """Loads the weights of a run.

    Runs of version 0164ae8 and before have no `metadata.json`; their classes come from the data.

    Args:
      workdir: the run directory.
      step: of the checkpoint; default: the newest valid one.

    Raises:
      ValueError: no run or no valid checkpoint there.
    """
    workdir = workdir if isinstance(workdir, Workdir) else Workdir(pathlib.Path(workdir))
    settings = workdir.read_settings()
    metadata = workdir.read_metadata() or _metadata_from_data(workdir, settings)
    model = build_model(settings, len(metadata.classes))
    with Checkpoints(workdir.checkpoints) as checkpoints:
        found, variables = checkpoints.restore_variables(step)
    return RunWeights(workdir.path, settings, model, variables, found, metadata)


def validation_images(run: RunWeights, count: int) -> tuple[np.ndarray, str]:
    """Real images of the shape that a run's network is evaluated on.

    The run's own validation images if its data are there, else crops of the built-in
    photographs, in gray for a single channel.

    Args:
      run: whose images.
      count: largest number of images.

    Returns:
      uint8 (images, height, width, channels), and what they are, e.g.
      `360 validation images of digits`.

    Raises:
      ValueError: no data, and a number of channels that photographs do not have.
    """
    source, (height, width, channels) = run.settings.data.source, run.eval_shape
    try:
        images = load(run.settings.data).evaluation_images(count)
    except (ImportError, OSError, ValueError) as error:  # only training needs some libraries
        if channels not in (1, 3):
            raise
        images = photo_crops(max(height, width))[:, :height, :width]
        if channels == 1:
            images = images.mean(-1, keepdims=True).round().astype(np.uint8)
        reason = one_line(error)
        return images, f"{len(images)} crops of built-in photographs (no {source}: {reason})"
    return images, f"{len(images):,} validation images of {source}"


def run_directory(source: str | pathlib.Path) -> Workdir | None:
    """The run directory at `source`; None for a file, a hub name or a deploy directory."""
    path = pathlib.Path(source)
    return Workdir(path) if path.is_dir() and not (path / "model.safetensors").exists() else None


def check_source(source: str) -> None:
    """Checks that there is something at `config.init_from`, without reading any weights.

    Raises:
      ValueError: nothing there, or a run without a checkpoint.
    """
    if (workdir := run_directory(source)) is not None:
        workdir.read_settings()
        if not workdir.has_checkpoint:
            raise ValueError(f"{workdir.path} holds no checkpoint yet; train there first")
    elif source not in PRETRAINED and not pathlib.Path(source).exists():
        load_file_or_pretrained(source)  # raises


def starting_state(experiment: Experiment) -> TrainState:
    """The state before the first step: random weights, or those that `config.init_from` names.

    `config.init_from` names a weights file, one of timm's pretrained models, a run directory or
    a deploy directory. The head is replaced if the classes differ.

    Raises:
      ValueError: nothing readable there, or another network.
    """
    state, source = experiment.initial_state(), experiment.settings.init_from
    if not source:
        return state
    merged = starting_weights(experiment, source, state)
    logger.info("%s (%s)", merged, source)
    begun = state_from(merged.variables, experiment.optimizer, average=bool(state.ema))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.device_put(begun, shardings)


def starting_weights(
    experiment: Experiment, source: str, state: TrainState | None = None
) -> Merged:
    """Weights from elsewhere, merged into the network of an experiment.

    Args:
      experiment: whose network.
      source: as `config.init_from`.
      state: its initial state, if there is one already.

    Raises:
      ValueError: nothing readable there, or another network.
    """
    fresh = experiment.initial_state() if state is None else state
    weights = _load(source, experiment.model.variant)
    return merge_weights(weights, jax.device_get(fresh.variables))


def _load(source: str, variant: Any) -> Weights:
    path = pathlib.Path(source)
    if (workdir := run_directory(path)) is not None:
        run = load_run(workdir)
        return Weights(
            variant=run.model.variant.name,
            deploy=False,
            variables=run.variables,
            num_classes=run.model.num_classes,
            family="flax",
        )
    if path.is_dir():
        return load_weights(path / "model.safetensors", variant=variant)
    return load_file_or_pretrained(source, variant=variant)


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
