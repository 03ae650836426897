"""Sources: random access to labeled images, in memory or in a tree with a folder per class.

    ROOT/train/n01440764/n01440764_10026.JPEG
    ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG

Classes and images are in the order of their names, whatever the order of the file system.
`records.py` reads data sets that were prepared as ArrayRecord files.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from repvgg_jax.text import first_few


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


FOLDER_SPLITS = ("train", "val")
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Of image files, in either case; other files, and names that begin with a dot, are ignored."""


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The images of one split of a tree with a folder per class.

    Attributes:
      root: the split's directory.
      names: paths below it, bytes (n,); a list of strings would cost workers memory.
      labels: int32 (n,).
    """

    root: pathlib.Path
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes, its label, and its path from the split on."""
        name = os.fsdecode(self.names[index])
        return {
            "encoded": (self.root / name).read_bytes(),
            "label": int(self.labels[index]),
            "name": f"{self.root.name}/{name}",
        }

    def path(self, index: int) -> pathlib.Path:
        """Path of image number `index`."""
        return self.root / os.fsdecode(self.names[index])


def load_folder(root: pathlib.Path) -> tuple[FolderSource, FolderSource, tuple[str, ...]]:
    """Training images, validation images and class names.

    Raises:
      ValueError: no such tree, an empty class, or splits of different classes.
    """
    for split in FOLDER_SPLITS:
        if not (root / split).is_dir():
            raise ValueError(
                f"{root / split} is not a directory; a class-per-folder tree has "
                f"{root}/train/CLASS/IMAGE.JPEG and {root}/val/CLASS/IMAGE.JPEG"
            )
    train, val = (_folders(root / split) for split in FOLDER_SPLITS)
    if train != val:
        only = {"train": set(train) - set(val), "val": set(val) - set(train)}
        raise ValueError(
            f"{root}: train and val have different classes; "
            + "; ".join(
                f"only in {split}: {first_few(sorted(names))}"
                for split, names in only.items()
                if names
            )
        )
    return _folder_source(root / "train", train), _folder_source(root / "val", train), tuple(train)


def _folders(root: pathlib.Path) -> list[str]:
    with os.scandir(root) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders; there must be one per class")
    return found


def _folder_source(root: pathlib.Path, classes: list[str]) -> FolderSource:
    names, labels, empty = [], [], []
    for label, name in enumerate(classes):
        with os.scandir(root / name) as entries:
            found = sorted(
                e.name
                for e in entries
                if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")
            )
        names += [os.fsencode(f"{name}/{file}") for file in found]
        labels += [label] * len(found)
        empty += [] if found else [name]
    if empty:
        raise ValueError(f"{root}: no images ({', '.join(SUFFIXES)}) of class {first_few(empty)}")
    return FolderSource(root, np.array(names), np.array(labels, np.int32))


def photo_crops(size: int, count: int = 16) -> np.ndarray:
    """Square crops of two photographs that come with scikit-learn: uint8 (count, size, size, 3).

    For proofs and pictures without a data set: a temple and a flower, 427x640 pixels; © their
    authors, under the licenses in scikit-learn. The crops are spread evenly over the
    photographs. Above a size of 427, pixels are repeated.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    per_photo = -(-count // len(photos))
    found = []
    for photo in photos:
        times = -(-size // min(photo.shape[:2]))
        enlarged = photo.repeat(times, axis=0).repeat(times, axis=1)
        height, width, _ = enlarged.shape
        fraction = np.linspace(0, 1, per_photo)
        tops = ((height - size) * fraction).astype(int)
        lefts = ((width - size) * ((3 * fraction) % 1.001)).astype(int)
        found += [
            enlarged[top : top + size, left : left + size]
            for top, left in zip(tops, lefts, strict=True)
        ]
    return np.stack(found[:count])
