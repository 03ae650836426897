"""A tree of image files with a folder for every class.

    ROOT/train/n01440764/n01440764_10026.JPEG
    ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG

Classes and images come in the order of their names, whatever the file system says.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

SPLITS = ("train", "val")
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""What an image's name ends in, in either case; other files, and names with a dot in front,
are none."""


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The images of one split.

    Attributes:
      root: the split's directory.
      names: paths below it, UTF-8 bytes (n,); a list of strings would cost workers memory.
      labels: int32 (n,).
    """

    root: pathlib.Path
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes, its label, its path below the directory of the splits."""
        name = os.fsdecode(self.names[index])
        return {
            "encoded": (self.root / name).read_bytes(),
            "label": int(self.labels[index]),
            "name": f"{self.root.name}/{name}",
        }

    def path(self, index: int) -> pathlib.Path:
        """Where image number `index` lies."""
        return self.root / os.fsdecode(self.names[index])


def load(root: pathlib.Path) -> tuple[FolderSource, FolderSource, tuple[str, ...]]:
    """Training images, held-out images and class names.

    Raises:
      ValueError: no such tree, an empty class, or splits of different classes.
    """
    for split in SPLITS:
        if not (root / split).is_dir():
            raise ValueError(
                f"{root / split} is no directory; a class-per-folder tree has "
                f"{root}/train/CLASS/IMAGE.JPEG and {root}/val/CLASS/IMAGE.JPEG"
            )
    train, val = (_classes(root / split) for split in SPLITS)
    if train != val:
        only = [f"only in train: {_some(set(train) - set(val))}"] if set(train) - set(val) else []
        only += [f"only in val: {_some(set(val) - set(train))}"] if set(val) - set(train) else []
        raise ValueError(f"{root}: train and val have different classes; {'; '.join(only)}")
    return _source(root / "train", train), _source(root / "val", train), tuple(train)


def _classes(root: pathlib.Path) -> list[str]:
    with os.scandir(root) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders; there must be one for every class")
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
        raise ValueError(f"{root}: no images ({', '.join(SUFFIXES)}) of class {_some(set(empty))}")
    return FolderSource(root, np.array(names), np.array(labels, np.int32))


def _some(names: set[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest
