"""A data set: two sources of labelled images, and the table of those that we can load."""

import dataclasses
import difflib
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from ml_collections import ConfigDict

from repvgg_jax.data import digits, fake, folder, records, tfds
from repvgg_jax.data.arrays import ArraySource
from repvgg_jax.data.reading import EvalReader
from repvgg_jax.data.source import Source
from repvgg_jax.data.undecodable import Undecodable
from repvgg_jax.data.views import CentreCrop, RandomResizedCrop


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run learns from and is judged by.

    Attributes:
      name: as given in `config.data.source`.
      train: images to learn from.
      evaluation: held-out images.
      image_shape: (height, width, channels) of training images.
      eval_shape: likewise of held-out images.
      classes: the classes' names, by label.
      train_crop: what training shows of an image; None shows it as it is.
      eval_crop: what evaluation shows of one.
      workers: processes that read; 0 reads in this one.
      threads: that read in each of them.
      max_bad: images that may be undecodable.
      undecodable: those that were met so far.
    """

    name: str
    train: Source
    evaluation: Source
    image_shape: tuple[int, int, int]
    eval_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train_crop: RandomResizedCrop | None = None
    eval_crop: CentreCrop | None = None
    workers: int = 0
    threads: int = 1
    max_bad: int = 0
    undecodable: Undecodable = dataclasses.field(default_factory=lambda: Undecodable(0))

    def evaluation_images(self, count: int) -> np.ndarray:
        """The first held-out images as evaluation shows them: uint8 (count, *eval_shape).

        Those that cannot be decoded are left out.
        """
        read = EvalReader(self.evaluation, self.eval_crop, self.eval_shape)
        examples = map(read, range(min(count, len(self.evaluation))))
        return np.stack([example["image"] for example in examples if example["mask"]])


Loaded = tuple[Source, Source, tuple[str, ...]]

_LOADERS: Mapping[str, Callable[[str, ConfigDict], Loaded]] = {
    "digits": lambda _, settings: digits.load(),
    "fake": lambda _, settings: fake.load(),
    "tfds:": lambda name, settings: tfds.load(
        name,
        directory=settings.directory,
        train_split=settings.train_split,
        eval_split=settings.eval_split,
    ),
    "folder:": lambda path, settings: folder.load(pathlib.Path(path).expanduser()),
    "records:": lambda path, settings: records.load(pathlib.Path(path).expanduser()),
}

_FORMS = "digits, fake, tfds:NAME, folder:DIRECTORY, records:DIRECTORY"


def load(settings: ConfigDict) -> Dataset:
    """Loads what `config.data` describes.

    Args:
      settings: `config.data`.

    Raises:
      ValueError: no such data set, data missing, or a setting that cannot work with them.
    """
    name = settings.source
    kind, colon, place = name.partition(":")
    if kind + colon not in _LOADERS or (colon and not place):
        near = difflib.get_close_matches(kind, [key.rstrip(":") for key in _LOADERS], n=1)
        hint = f"did you mean {near[0]!r}? " if near and near[0] != name else ""
        raise ValueError(
            f"unknown data set {name!r} in config.data.source; {hint}there are: {_FORMS}"
        )
    _check(settings)
    train, evaluation, classes = _LOADERS[kind + colon](place, settings)
    if settings.num_classes and settings.num_classes != len(classes):
        raise ValueError(
            f"config.data.num_classes={settings.num_classes}, but {name} has {len(classes)} "
            f"classes; 0 takes what the data have"
        )
    train_size, eval_size = settings.train_size, settings.eval_size or settings.train_size
    if isinstance(train, ArraySource):
        height, width, channels = train.images.shape[1:]
    elif train_size:
        height = width = 0
        channels = 3
    else:
        raise ValueError(
            f"config.data.train_size=0, but the images of {name} have many sizes; "
            f"--config.data.train_size=224 is ImageNet's usual one"
        )
    return Dataset(
        name=name,
        train=train,
        evaluation=evaluation,
        image_shape=(train_size or height, train_size or width, channels),
        eval_shape=(eval_size or height, eval_size or width, channels),
        classes=classes,
        train_crop=(
            RandomResizedCrop(tuple(settings.crop_scale), tuple(settings.crop_ratio))
            if train_size
            else None
        ),
        eval_crop=CentreCrop(eval_size, settings.eval_crop) if eval_size else None,
        workers=settings.workers,
        threads=settings.threads,
        max_bad=settings.max_bad,
        undecodable=Undecodable(settings.max_bad),
    )


def _check(settings: ConfigDict) -> None:
    least = {"num_classes": 0, "train_size": 0, "eval_size": 0, "workers": 0, "threads": 1}
    for name, minimum in {**least, "max_bad": 0}.items():
        if settings[name] < minimum:
            raise ValueError(f"config.data.{name}={settings[name]} must be {minimum} or more")
    if not 0 < settings.eval_crop <= 1:
        raise ValueError(
            f"config.data.eval_crop={settings.eval_crop} must be above 0 and at most 1: the share "
            f"of the short side that evaluation sees"
        )
    for name, most in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
        values = tuple(settings[name])
        if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
            raise ValueError(
                f"config.data.{name}={values} must be two numbers, the smaller first, above 0"
                + (f" and at most {most:g}" if most == 1 else "")
            )
