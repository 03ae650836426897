"""Sources: random access to labeled images; those that are in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Random access to labeled images; pickled for worker processes.

    `source[i]` is `{"image": uint8 (height, width, channels), "label": int}` or
    `{"encoded": bytes, "label": int, "name": str}`: the same keys for all images of a source.
    """

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Image and label number `index`.

        Raises:
          OSError: it cannot be read.
        """
        ...


Splits = tuple[Source, Source, tuple[str, ...]]
"""Training images, validation images, class names by label."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images uint8 (n, height, width, channels) and labels (n,) in memory."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image and label number `index`."""
        return {"image": self.images[index], "label": np.int32(self.labels[index])}


DIGITS_VALIDATION = 360
"""Validation images of `load_digits`, a fifth, with every digit in the same proportion."""


def load_digits() -> Splits:
    """Handwritten digits: 1,797 real images of 8x8 pixels that come with scikit-learn.

    The split never changes. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
    Digits, UCI, 1998.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, data.target, test_size=DIGITS_VALIDATION, stratify=data.target, random_state=0
    )
    return (
        ArraySource(train_images, train_labels),
        ArraySource(test_images, test_labels),
        tuple(str(name) for name in data.target_names),
    )


def load_fake() -> Splits:
    """512 and 100 images of noise, 32x32 pixels, in four classes that differ in brightness.

    For trying out a configuration, a machine or the loop without any data.
    """
    return _noise(512, seed=0), _noise(100, seed=1), tuple(f"shade {i}" for i in range(4))


def _noise(count: int, seed: int) -> ArraySource:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    shade = 40 + 50 * labels[:, None, None, None]
    noise = rng.integers(-20, 20, (count, 32, 32, 3))
    return ArraySource((shade + noise).astype(np.uint8), labels)
