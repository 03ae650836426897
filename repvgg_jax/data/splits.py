"""Which images are for training and which for validation."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from repvgg_jax.data.settings import DataSettings
from repvgg_jax.data.sources import Source

_DEFAULT = "validation"  # TFDS's name, and the default of config.data.eval_split


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of a source.

    Attributes:
      source: the images.
      numbers: of those that are in it, in their order.
    """

    source: Source
    numbers: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Image and label number `index`."""
        return self.source[int(self.numbers[index])]

    @property
    def labels(self) -> np.ndarray | None:
        """Labels, if the source knows them without reading images."""
        labels = getattr(self.source, "labels", None)
        return None if labels is None else np.asarray(labels)[self.numbers]

    @property
    def names(self) -> np.ndarray | None:
        """File names, if the source knows them."""
        names = getattr(self.source, "names", None)
        return None if names is None else np.asarray(names)[self.numbers]


def hold_out(source: Source, share: float) -> tuple[Subset, Subset]:
    """Splits a source into images to train on and images to validate on.

    The same images are held out every time: a fixed random share of each class or, if the source
    does not know its labels, of all images. Of a class with two images or more, one at least is on
    either side.

    Args:
      source: all images.
      share: to hold out, above 0 and below 1.

    Returns:
      Training images and validation images, each in their order in the source.

    Raises:
      ValueError: too few images to split.
    """
    labels = getattr(source, "labels", None)
    labels = np.zeros(len(source), int) if labels is None else np.asarray(labels)
    order = np.random.Generator(np.random.Philox(key=[0, len(source)])).permutation(len(source))
    held = []
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        wanted = round(share * len(of_class))
        held.append(of_class[: min(max(1, wanted), len(of_class) - 1)])
    out = np.zeros(len(source), bool)
    out[np.concatenate(held, dtype=int) if held else []] = True
    if not out.any():
        raise ValueError(
            f"config.data.holdout={share}: {len(source)} images, too few to hold any out"
        )
    return Subset(source, np.flatnonzero(~out)), Subset(source, np.flatnonzero(out))


def named_splits(
    has: Callable[[str], bool], settings: DataSettings, *, training: bool
) -> tuple[str, str]:
    """The names of the training and of the validation images of a data set.

    Args:
      has: whether images of that name are there.
      settings: name them.
      training: whether there must be training images; otherwise validation images alone will do.
    """
    if settings.holdout:
        return settings.train_split, settings.train_split
    evaluation = settings.eval_split
    if evaluation == _DEFAULT and not has(evaluation):
        evaluation = "val"
    alone = not training and not has(settings.train_split)
    return (evaluation if alone else settings.train_split), evaluation


def tfds_splits(settings: DataSettings, *, training: bool) -> tuple[str, str]:
    """The splits of a data set of TFDS; as `named_splits`."""
    if settings.holdout:
        return settings.train_split, settings.train_split
    return (settings.train_split if training else settings.eval_split), settings.eval_split
