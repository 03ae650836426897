"""Real images to prove a conversion on: of the run, of other data, or built in."""

import dataclasses
import pathlib

import numpy as np

from repvgg_jax.data.dataset import load
from repvgg_jax.data.identity import SplitIdentity
from repvgg_jax.data.masks import is_cityscapes, is_pairs
from repvgg_jax.data.records import MANIFEST, Manifest
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.data.sources import photo_crops
from repvgg_jax.text import one_line
from repvgg_jax.train.restore import RunWeights


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
        names = Manifest.read(path).splits if known["records"] else ()
        below = known["records"] or any((path / name).is_dir() for name in ("val", "validation"))
        split = "validation" if below else "."  # of records and folders, or `val`
        if len(names) == 1:
            (split,) = names
        settings = dataclasses.replace(settings, eval_split=split)
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
