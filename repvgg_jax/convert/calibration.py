"""Images for calibration and for evaluation of a quantized network."""

import dataclasses
import pathlib

import numpy as np

from repvgg_jax.classifier import Classifier, center_crop, find_images
from repvgg_jax.convert.source import reading_of
from repvgg_jax.convert.subject import PROOF_IMAGES, Source
from repvgg_jax.data.dataset import BUILT_IN, LOCATED, Dataset, load
from repvgg_jax.data.joint_crop import WholeImage
from repvgg_jax.data.records import MANIFEST
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.text import first_few, one_line, plural
from repvgg_jax.train.proof_images import data_settings

CALIBRATION_IMAGES = 256
"""Largest number of images if `--calibrate` gives none; more change ranges little."""

RUN = "run"
"""The training images of the run that is converted."""


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """What `--calibrate` asks for.

    Attributes:
      source: `run`, a data set as in `config.data.source`, or a directory of images.
      count: of images; None for up to `CALIBRATION_IMAGES`.
    """

    source: str
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Calibrate":
        """The value of the flag, `SOURCE` or `SOURCE:N`.

        Raises:
          ValueError: no source, or a number below 1.
        """
        source, colon, count = text.rpartition(":")
        if not colon or not count.lstrip("-").isdecimal() or source in LOCATED:
            source, count = text, ""
        if not source or (count and int(count) < 1):
            raise ValueError(
                f"--calibrate={text} must be SOURCE or SOURCE:N, N images of it, e.g. run:256, "
                "or a directory of images"
            )
        return cls(source, int(count) if count else None)

    def __str__(self) -> str:
        return self.source if self.count is None else f"{self.source}:{self.count}"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images, and what they are.

    Attributes:
      images: uint8 (images, height, width, channels).
      what: e.g. "256 training images of digits".
      labels: (images,); None if they are unknown, or of other classes.
      note: why there are no labels; empty if there are.
    """

    images: np.ndarray
    what: str
    labels: np.ndarray | None = None
    note: str = ""


def calibration_images(source: Source, asked: Calibrate) -> Examples:
    """Images to calibrate a network with: from all over the source, without augmentation.

    Raises:
      ValueError: they are missing, of another shape, fewer than asked for, or of a single color.
    """
    shape = source.images.shape[1:]
    flag = f"--calibrate={asked}"
    try:
        if asked.source == RUN:
            found = _of_run(source, asked)
        elif pathlib.Path(asked.source).exists() and not _is_records(asked.source):
            found = _of_directory(source, asked)
        else:
            found = _of_data(source, asked)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{flag}: {one_line(error, 500)}") from error
    if found.images.shape[1:] != shape:
        raise ValueError(
            f"{flag}: images have the shape {found.images.shape[1:]}, but the network takes {shape}"
        )
    if asked.count is not None and len(found.images) < asked.count:
        raise ValueError(
            f"{flag} asks for {plural(asked.count, 'image')}, but {asked.source} has "
            f"{len(found.images):,} that can be read; ask for no more"
        )
    constant = sum(bool((image == image[:1, :1]).all()) for image in found.images)
    if constant == len(found.images):
        raise ValueError(
            f"{flag}: all {plural(constant, 'image')} are of a single color; calibrate with images "
            "like those the network was trained on"
        )
    return found


def _of_run(source: Source, asked: Calibrate) -> Examples:
    if not source.is_run or source.reading is None:
        raise ValueError(
            f"only --workdir has training images of its own, {source.title} has none; give a data "
            "set or a directory of images"
        )
    try:
        dataset = load(source.reading)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"the data of the run are not there ({one_line(error)}); give another data set or a "
            "directory of images"
        ) from error
    return _training(source, dataset, asked)


def _of_data(source: Source, asked: Calibrate) -> Examples:
    shape = source.images.shape[1:]
    height, width, channels = shape
    reading = source.reading or reading_of((height, width, channels), asked.source, source.crop)
    return _training(source, load(_settings(asked.source, reading, shape)), asked)


def _settings(data: str, reading: DataSettings, shape: tuple[int, ...]) -> DataSettings:
    """How a data set is read; those in memory as they are, others at the network's size."""
    size: int | tuple[int, int] = 0 if data in BUILT_IN else (shape[0], shape[1])
    sized = dataclasses.replace(reading, train_size=size, eval_size=size, sizes=())
    return data_settings(data, sized)


def _training(source: Source, dataset: Dataset, asked: Calibrate) -> Examples:
    count = asked.count or source.at_most(CALIBRATION_IMAGES)
    images, _ = dataset.spread_examples(count, training=True)
    return Examples(images, f"{len(images):,} training images of {dataset.name}")


def _of_directory(source: Source, asked: Calibrate) -> Examples:
    """All image files below a directory, whatever its structure."""
    files = find_images([asked.source])
    count = min(asked.count or source.at_most(CALIBRATION_IMAGES), len(files))
    height, width, channels = source.images.shape[1:]
    shape = (height, width, channels)
    crop = center_crop(shape, **dataclasses.asdict(source.crop))
    reader = Classifier(
        source.model, source.variables, source.normalize, source.labels, shape, crop
    )
    red, green, blue = (255 * np.resize(source.normalize.mean, 3)).tolist()
    whole = WholeImage(shape[:2], (red, green, blue))

    def read(path: str) -> np.ndarray:
        """Reads an image as evaluation does: a crop, or for segmenters the whole with a border."""
        if not source.per_pixel:
            return reader.preprocess(path)
        image = reader.whole(path)
        return whole({"image": image, "label": image[..., 0], "name": "it"})[0]

    images = []
    for number in range(count):
        path = files[number * len(files) // count]
        try:
            images.append(read(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Examples(np.stack(images), f"{count:,} images of {asked.source}")


def _is_records(text: str) -> bool:
    return (pathlib.Path(text) / MANIFEST).is_file()


def evaluation_examples(source: Source) -> Examples:
    """Labeled images to evaluate a network on, as many as in its proof, or those of its proof.

    They are spread over the validation images of the run, or of `--data`.
    """
    plain = Examples(source.images, source.image_source)
    if source.evaluation is None:
        return dataclasses.replace(
            plain, note=f"no labels of {source.image_source}; --data names labeled images"
        )
    try:
        dataset = load(source.evaluation, training=False)
    except (ImportError, OSError, ValueError) as error:
        return dataclasses.replace(plain, note=f"no labels: {one_line(error)}")
    if note := _other_classes(source, dataset.classes):
        return dataclasses.replace(plain, note=note)
    images, labels = dataset.spread_examples(source.at_most(PROOF_IMAGES))
    if images.shape[1:] != source.images.shape[1:]:
        return dataclasses.replace(plain, note=f"images of {dataset.name} have another shape")
    return Examples(images, f"{len(images):,} validation images of {dataset.name}", labels)


def _other_classes(source: Source, classes: tuple[str, ...]) -> str:
    """Why labels of these classes are not the network's; empty if they are."""
    if len(classes) != source.model.num_classes:
        return (
            f"no accuracy: {len(classes)} classes, but the network has {source.model.num_classes}"
        )
    if source.labels and source.labels != classes:
        wrong = [new for old, new in zip(source.labels, classes, strict=True) if old != new]
        return f"no accuracy: classes that the network does not have there: {first_few(wrong)}"
    return ""
