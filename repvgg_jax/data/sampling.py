"""Which training image comes next, without end: each as often, or each class as often."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.identity import labels_of

Draw = tuple[int, int]
"""The number of an image, and how many times it was drawn before."""


def draws(dataset: Dataset, seed: int) -> grain.MapDataset:
    """The endless stream of `Draw`s; each is found at once, without those before.

    Args:
      dataset: its training images, and `sampling`. "uniform" draws every image once per pass over
        the data, in an order of its own. "balanced" draws every class equally often, and every
        image of a class; images of small classes come again sooner.
      seed: of the order.

    Raises:
      ValueError: no image can be drawn.
    """
    count = len(dataset.train)
    if dataset.sampling == "uniform":
        return _shuffled(count, seed).map_with_index(_Uniform(count))
    labels = labels_of(dataset.train)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    if not classes:
        raise ValueError(f"none of the {count} training images of {dataset.name} can be read")
    per_class = max(1, count // len(classes))
    return _shuffled(per_class * len(classes), seed).map_with_index(
        _Balanced(per_class, classes, seed)
    )


def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """The numbers below `count`, again and again, every time in another order."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


@dataclasses.dataclass(frozen=True)
class _Uniform:
    """(position in the stream, image number) -> `Draw`."""

    count: int

    def __call__(self, position: int, number: int) -> Draw:
        return number, position // self.count


class _Balanced:
    """(position in the stream, seat) -> `Draw`; a pass has `per_class` seats for every class."""

    def __init__(self, per_class: int, classes: Sequence[np.ndarray], seed: int):
        self._per_class = per_class
        self._classes = classes
        self._orders = [
            _shuffled(len(numbers), int(np.random.SeedSequence([seed, i]).generate_state(1)[0]))
            for i, numbers in enumerate(classes)
        ]

    def __call__(self, position: int, seat: int) -> Draw:
        label, of_class = seat % len(self._classes), seat // len(self._classes)
        passed = position // (self._per_class * len(self._classes))
        numbers = self._classes[label]
        drawn = passed * self._per_class + of_class
        return int(numbers[self._orders[label][drawn]]), drawn // len(numbers)
