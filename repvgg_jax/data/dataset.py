"""A data set: two sources of labeled images, and the table of those that can be loaded."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from repvgg_jax import text
from repvgg_jax.data import records, tfds
from repvgg_jax.data.images import CenterCrop, RandomResizedCrop
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.data.sources import ArraySource, Source, Splits, load_digits, load_fake, load_folder
from repvgg_jax.data.transforms import BadImages, EvalTransform


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run trains on and is evaluated on.

    Attributes:
      name: as in `config.data.source`.
      train: training images.
      evaluation: validation images.
      image_shape: (height, width, channels) of training images.
      eval_shape: (height, width, channels) of validation images.
      classes: class names by label.
      train_crop: random crop of training images; None takes them as they are.
      eval_crop: center crop of validation images; None takes them as they are.
      workers: processes that read; 0 reads in this one.
      threads: per process that reads.
      bad_images: those met so far, and how many are allowed.
    """

    name: str
    train: Source
    evaluation: Source
    image_shape: tuple[int, int, int]
    eval_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train_crop: RandomResizedCrop | None = None
    eval_crop: CenterCrop | None = None
    workers: int = 0
    threads: int = 1
    bad_images: BadImages = dataclasses.field(default_factory=BadImages)

    def evaluation_images(self, count: int) -> np.ndarray:
        """The first validation images as evaluation sees them: uint8 (count, *eval_shape).

        Those that cannot be decoded are left out.
        """
        transform = EvalTransform(self.evaluation, self.eval_crop, self.eval_shape)
        examples = [transform(i)[0] for i in range(min(count, len(self.evaluation)))]
        return np.stack([example["image"] for example in examples if example["mask"]])


_LOADERS: Mapping[str, Callable[[str, DataSettings], Splits]] = {
    "digits": lambda _, settings: load_digits(),
    "fake": lambda _, settings: load_fake(),
    "tfds:": lambda name, settings: tfds.load(
        name,
        directory=settings.directory,
        train_split=settings.train_split,
        eval_split=settings.eval_split,
    ),
    "folder:": lambda path, settings: load_folder(pathlib.Path(path).expanduser()),
    "records:": lambda path, settings: records.load(pathlib.Path(path).expanduser()),
}

_SOURCES = "digits, fake, tfds:NAME, folder:DIRECTORY, records:DIRECTORY"


def load(settings: DataSettings) -> Dataset:
    """Loads the data set that `config.data` describes.

    Args:
      settings: `config.data`.

    Raises:
      ValueError: unknown or missing data, or a setting that does not fit them.
    """
    name = settings.source
    kind, colon, location = name.partition(":")
    if kind + colon not in _LOADERS or (colon and not location):
        hint = text.did_you_mean(kind, [key.rstrip(":") for key in _LOADERS if key != name])
        raise ValueError(
            f"unknown data set {name!r} in config.data.source; {hint}there are: {_SOURCES}"
        )
    train, evaluation, classes = _LOADERS[kind + colon](location, settings)
    if settings.num_classes and settings.num_classes != len(classes):
        raise ValueError(
            f"config.data.num_classes={settings.num_classes}, but {name} has {len(classes)} "
            f"classes; 0 takes the number from the data"
        )
    train_size, eval_size = settings.train_size, settings.eval_size or settings.train_size
    if isinstance(train, ArraySource):
        height, width, channels = train.images.shape[1:]
    elif train_size:
        height = width = 0
        channels = 3
    else:
        raise ValueError(
            f"config.data.train_size=0, but the images of {name} differ in size; "
            f"--config.data.train_size=224 is usual for ImageNet"
        )
    return Dataset(
        name=name,
        train=train,
        evaluation=evaluation,
        image_shape=(train_size or height, train_size or width, channels),
        eval_shape=(eval_size or height, eval_size or width, channels),
        classes=classes,
        train_crop=(
            RandomResizedCrop(settings.crop_scale, settings.crop_ratio) if train_size else None
        ),
        eval_crop=CenterCrop(eval_size, settings.eval_crop) if eval_size else None,
        workers=settings.workers,
        threads=settings.threads,
        bad_images=BadImages(settings.max_bad),
    )
