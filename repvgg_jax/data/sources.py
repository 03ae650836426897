"""Sources: random access to labeled images, in memory or in a tree with a folder per class.

    ROOT/train/n01440764/n01440764_10026.JPEG
    ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG

Classes and images are in the order of their names, whatever the order of the file system.
`records.py` reads data sets that were prepared as ArrayRecord files.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from repvgg_jax.data.decoding import read_file
from repvgg_jax.data.settings import Size, height_width
from repvgg_jax.text import first_few, plural

logger = logging.getLogger(__name__)


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
_JPEG, _OTHERS = (".jpeg", ".jpg", ".jfif"), (".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES = (*_JPEG, *_OTHERS, ".ppm", ".pgm")
"""Suffixes of image files, in either case. Other files are counted, and names that begin with a dot
are ignored."""

_OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # in folders that were opened under Windows


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
            "encoded": read_file(self.root / name),
            "label": int(self.labels[index]),
            "name": f"{self.root.name}/{name}",
        }

    def path(self, index: int) -> pathlib.Path:
        """Path of image number `index`."""
        return self.root / os.fsdecode(self.names[index])


def load_folder(
    root: pathlib.Path, *, splits: tuple[str, str] = FOLDER_SPLITS, allow_empty: bool = False
) -> tuple[FolderSource, FolderSource, tuple[str, ...]]:
    """Training images, validation images and class names.

    Images are read as torchvision's ImageFolder does, those in subfolders of a class included, in
    the order of directories, then of names. Files that are not images are counted in a warning.

    Args:
      root: holds the two splits, with a folder per class in each.
      splits: their folders, of training and of validation; twice the same if there is one only.
      allow_empty: classes may lack images, and the second split may lack classes; a warning names
        them.

    Raises:
      ValueError: no such tree, an empty class, or splits of different classes.
    """
    sources, classes = load_folders(root, splits, allow_empty=allow_empty)
    return sources[0], sources[1], classes


def load_folders(
    root: pathlib.Path, splits: Sequence[str], *, allow_empty: bool = False
) -> tuple[list[FolderSource], tuple[str, ...]]:
    """The images of any number of splits, and class names, which are those of the first one."""
    for split in splits:
        if not (root / split).is_dir():
            raise ValueError(
                f"{root / split} is not a directory; a class-per-folder tree has "
                f"{root}/train/CLASS/IMAGE.JPEG and {root}/val/CLASS/IMAGE.JPEG; "
                f"config.data.train_split and eval_split name other folders, and "
                f"config.data.holdout=0.2 evaluates on a share of the training images"
            )
    classes = _folders(root / splits[0])
    for split in splits[1:]:
        found = _folders(root / split)
        missing, added = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        if added or (missing and not allow_empty):
            only = zip((splits[0], split), (missing, added), strict=True)
            raise ValueError(
                f"{root}: {splits[0]} and {split} have different classes; "
                + "; ".join(f"only in {name}: {first_few(names)}" for name, names in only if names)
                + ("" if added else "; config.data.allow_empty=True allows that")
            )
    # With images held out, training and validation images are in one folder.
    sources = {
        split: _folder_source(root / split, classes, allow_empty) for split in dict.fromkeys(splits)
    }
    return [sources[split] for split in splits], tuple(classes)


def _folders(root: pathlib.Path) -> list[str]:
    with os.scandir(root) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders; there must be one per class")
    return found


def _folder_source(root: pathlib.Path, classes: list[str], allow_empty: bool) -> FolderSource:
    names, labels, empty = [], [], []
    ignored = [file for file in sorted(_entries(root)[1]) if not _is_of_system(file)]
    for label, name in enumerate(classes):
        found = []
        for file in _files(root, name) if (root / name).is_dir() else ():
            if file.lower().endswith(SUFFIXES):
                found.append(os.fsencode(file))
            elif not _is_of_system(file):
                ignored.append(file)
        names += found
        labels += [label] * len(found)
        empty += [] if found else [name]
    suffixes = ", ".join(SUFFIXES)
    if ignored:
        logger.warning(
            "%s: %s ignored, in no class or without a name in %s: %s",
            root,
            plural(len(ignored), "file"),
            suffixes,
            first_few(ignored),
        )
    if empty and (len(empty) == len(classes) or not allow_empty):
        raise ValueError(
            f"{root}: no images ({suffixes}) of class {first_few(empty)}; add some, remove the "
            f"folder, or allow it with config.data.allow_empty=True"
        )
    if empty:
        logger.warning(
            "%s: no images of %d of %d classes: %s",
            root,
            len(empty),
            len(classes),
            first_few(empty),
        )
    return FolderSource(root, np.array(names), np.array(labels, np.int32))


def _is_of_system(file: str) -> bool:
    return file.rpartition("/")[2].lower() in _OF_SYSTEMS


def _entries(directory: pathlib.Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of everything else in a directory, without hidden ones."""
    folders: list[str] = []
    others: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else others).append(entry.name)
    return folders, others


def _is_folder(entry: os.DirEntry) -> bool:
    # Only a link has to be looked up, which takes long for a million images that are links.
    if entry.is_symlink() and entry.name.lower().endswith(SUFFIXES):
        return False
    return entry.is_dir()


def _files(root: pathlib.Path, top: str) -> list[str]:
    """Paths of everything below `root/top` that is not a folder, from `top` on.

    Links to folders are followed, but not back into a folder that is being read.
    """
    found: list[tuple[str, str]] = []
    todo: list[tuple[str, frozenset[str]]] = [(top, frozenset())]
    while todo:
        folder, above = todo.pop()
        real = os.path.realpath(root / folder)
        if real in above:
            continue
        inner, files = _entries(root / folder)
        found += [(folder, file) for file in files]
        todo += [(f"{folder}/{name}", above | {real}) for name in inner]
    return [f"{folder}/{file}" for folder, file in sorted(found)]


def photo_crops(size: Size, count: int = 16) -> np.ndarray:
    """Crops of two photographs that come with scikit-learn: uint8 (count, height, width, 3).

    For proofs and pictures without a data set: a temple and a flower, 427x640 pixels; © their
    authors, under the licenses in scikit-learn. The crops are spread evenly over the
    photographs. Above that size, pixels are repeated.

    Args:
      size: height and width of a crop, in pixels; one number for a square.
      count: of crops.
    """
    from sklearn.datasets import load_sample_images

    rows, columns = height_width(size)
    photos = load_sample_images().images
    per_photo = -(-count // len(photos))
    found = []
    for photo in photos:
        times = max(-(-rows // photo.shape[0]), -(-columns // photo.shape[1]))
        enlarged = photo.repeat(times, axis=0).repeat(times, axis=1)
        height, width, _ = enlarged.shape
        fraction = np.linspace(0, 1, per_photo)
        tops = ((height - rows) * fraction).astype(int)
        lefts = ((width - columns) * ((3 * fraction) % 1.001)).astype(int)
        found += [
            enlarged[top : top + rows, left : left + columns]
            for top, left in zip(tops, lefts, strict=True)
        ]
    return np.stack(found[:count])
