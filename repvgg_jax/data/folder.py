"""A tree of image files with a folder per class.

    ROOT/train/n01440764/n01440764_10026.JPEG
    ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG

Classes and images are in the order of their names, whatever the order of the file system.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from repvgg_jax import text

SPLITS = ("train", "val")
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Of image files, in either case; other files, and names that begin with a dot, are ignored."""


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The images of one split.

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


def load(root: pathlib.Path) -> tuple[FolderSource, FolderSource, tuple[str, ...]]:
    """Training images, validation images and class names.

    Raises:
      ValueError: no such tree, an empty class, or splits of different classes.
    """
    for split in SPLITS:
        if not (root / split).is_dir():
            raise ValueError(
                f"{root / split} is not a directory; a class-per-folder tree has "
                f"{root}/train/CLASS/IMAGE.JPEG and {root}/val/CLASS/IMAGE.JPEG"
            )
    train, val = (_classes(root / split) for split in SPLITS)
    if train != val:
        only = {"train": set(train) - set(val), "val": set(val) - set(train)}
        raise ValueError(
            f"{root}: train and val have different classes; "
            + "; ".join(
                f"only in {split}: {text.first_few(sorted(names))}"
                for split, names in only.items()
                if names
            )
        )
    return _source(root / "train", train), _source(root / "val", train), tuple(train)


def _classes(root: pathlib.Path) -> list[str]:
    with os.scandir(root) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders; there must be one per class")
    return found


def _source(root: pathlib.Path, classes: list[str]) -> FolderSource:
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
        raise ValueError(
            f"{root}: no images ({', '.join(SUFFIXES)}) of class {text.first_few(empty)}"
        )
    return FolderSource(root, np.array(names), np.array(labels, np.int32))
