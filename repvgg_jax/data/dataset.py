"""A data set: two sources of labelled images, and the table of those we know by name."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from repvgg_jax.data import digits, fake


class Source(Protocol):
    """Random access to labelled images.

    `source[i]` is `{"image": uint8 (height, width, channels), "label": int}`.
    """

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Image and label number `index`."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run learns from and is judged by.

    Attributes:
      name: as given in `config.data.source`.
      train: images to learn from.
      evaluation: held-out images.
      image_shape: (height, width, channels) of all images.
      classes: the classes' names, by label.
    """

    name: str
    train: Source
    evaluation: Source
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]


_LOADERS: Mapping[str, Callable[[], tuple[Source, Source, tuple[str, ...]]]] = {
    "digits": digits.load,
    "fake": fake.load,
}


def load(name: str) -> Dataset:
    """Loads a data set by the name that `config.data.source` gives.

    Raises:
      ValueError: no such data set.
    """
    if name not in _LOADERS:
        near = difflib.get_close_matches(name, _LOADERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown data set {name!r} in config.data.source; {hint}there are: "
            f"{', '.join(_LOADERS)}"
        )
    train, evaluation, classes = _LOADERS[name]()
    height, width, channels = train[0]["image"].shape
    return Dataset(name, train, evaluation, (height, width, channels), classes)
