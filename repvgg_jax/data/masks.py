"""Images with a class per pixel: Cityscapes, or any folder of image and mask pairs.

A mask is a file of one integer per pixel: gray values or palette indices, in PNG or another
format that keeps values. 255 is for pixels without a class. All checks of a mask name the file.

Cityscapes is read as it is unpacked; the ids of `*_labelIds.png` become the 19 classes that are
evaluated:

    ROOT/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
    ROOT/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png

Any other data set is a folder of pairs with the same name, and the names of its classes:

    ROOT/classes.txt                one name per line, label 0 first
    ROOT/train/images/street7.jpg   ROOT/train/masks/street7.png
    ROOT/val/images/…               ROOT/val/masks/…
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from repvgg_jax.data.decoding import Decoder, UndecodableError, decode, open_image, read_file
from repvgg_jax.data.sources import SUFFIXES, Source
from repvgg_jax.segmentation.labels import CITYSCAPES, IGNORE
from repvgg_jax.text import first_few, plural

_SPLITS = ("train", "val")
_CITYSCAPES_FOLDERS = ("leftImg8bit", "gtFine")
_PAIR_FOLDERS = ("train/images", "train/masks", "val/images", "val/masks")
_INVALID = 254  # in a table of labels: no file may have this value


_CITYSCAPES_IDS = 34  # ids of all classes, evaluated or not, are 0 … 33


def cityscapes_train_ids() -> np.ndarray:
    """The train id of every label id, uint8 (256,); 255 for classes that are not evaluated.

    Values that are not label ids become 254, which `read_mask` refuses.
    """
    table = np.full(256, _INVALID, np.uint8)
    table[:_CITYSCAPES_IDS] = IGNORE
    table[IGNORE] = IGNORE  # -1, the license plates
    for train_id, entry in enumerate(CITYSCAPES):
        table[entry.label_id] = train_id
    return table


def read_mask(
    encoded: bytes, num_classes: int, *, name: str, table: np.ndarray | None = None
) -> np.ndarray:
    """Decodes a mask and checks its labels.

    Args:
      encoded: a PNG or other lossless file with one integer per pixel.
      num_classes: labels are 0 … num_classes - 1, and 255.
      name: of the file, for messages.
      table: labels by value in the file, uint8 (256,); None if they are the same.

    Returns:
      uint8 (height, width).

    Raises:
      UndecodableError: not a mask, or labels outside the classes; with value, count and file.
    """
    values = _mask_values(encoded, name)
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        found, counts = np.unique(values[(values > 255) | (values < 0)], return_counts=True)
        raise UndecodableError(
            f"{name}: a label of {num_classes} classes is 0 … {num_classes - 1} or {IGNORE}, but "
            f"{plural(int(counts[0]), 'pixel')} of this {8 * values.itemsize}-bit mask have "
            f"{found[0]}"
        )
    labels = values.astype(np.uint8)
    mapped = labels if table is None else table[labels]
    wrong = (mapped >= num_classes) & (mapped != IGNORE)
    if wrong.any():
        found, counts = np.unique(labels[wrong], return_counts=True)
        listed = first_few(f"{value} ({count:,} pixels)" for value, count in zip(found, counts))  # noqa: B905
        raise UndecodableError(
            f"{name}: a label of {num_classes} classes is 0 … {num_classes - 1} or {IGNORE}, but "
            f"this mask has {listed}"
        )
    return mapped


def _mask_values(encoded: bytes, name: str) -> np.ndarray:
    try:
        with open_image(encoded) as image:
            if image.format == "JPEG":
                raise UndecodableError("JPEG changes the values of a mask; save it as PNG")
            if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
                raise UndecodableError(
                    f"a mask has one integer per pixel, but this file is {image.mode}; "
                    "save class numbers (gray or palette), not colors"
                )
            return np.asarray(image)
    except UndecodableError as error:
        raise UndecodableError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's plugins raise anything
        raise UndecodableError(f"{name}: {str(error) or type(error).__name__}") from error


@dataclasses.dataclass(frozen=True)
class PairDecoder:
    """Decodes an image and its mask, and checks one against the other.

    Attributes:
      num_classes: labels are 0 … num_classes - 1, and 255.
      cityscapes: whether masks hold label ids of Cityscapes.
      decoder: of the image.
    """

    num_classes: int
    cityscapes: bool = False
    decoder: Decoder = decode

    def __call__(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """`image` uint8 (height, width, 3), `label` uint8 (height, width) and `name`.

        Args:
          pair: `encoded` and `mask`, the bytes of two files, with `name` and `mask_name`.

        Raises:
          UndecodableError: a file is damaged, the two differ in size, or labels are wrong.
        """
        name, mask_name = pair["name"], pair["mask_name"]
        try:
            image = self.decoder(pair["encoded"])
        except UndecodableError as error:
            raise UndecodableError(f"{name}: {error}") from error
        table = cityscapes_train_ids() if self.cityscapes else None
        label = read_mask(pair["mask"], self.num_classes, name=mask_name, table=table)
        if image.shape[:2] != label.shape:
            raise UndecodableError(
                f"{name} has {_size(image)} pixels, but {mask_name} has {_size(label)}"
            )
        return {"image": image, "label": label, "name": name}


@dataclasses.dataclass(frozen=True)
class PairFiles:
    """Images and masks in files, in the order of their names.

    `source[i]` is what `PairDecoder` takes.

    Attributes:
      root: that names are below.
      images: paths of images, bytes (n,); a list of strings would cost workers memory.
      masks: paths of masks, bytes (n,).
    """

    root: pathlib.Path
    images: np.ndarray
    masks: np.ndarray

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The bytes of pair number `index`.

        Raises:
          OSError: a file cannot be read.
        """
        name, mask_name = (os.fsdecode(paths[index]) for paths in (self.images, self.masks))
        return {
            "encoded": read_file(self.root / name),
            "mask": read_file(self.root / mask_name),
            "name": name,
            "mask_name": mask_name,
        }


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Decoded images with a class per pixel.

    `source[i]` is `{"image": uint8 (height, width, 3), "label": uint8 (height, width),
    "name": str}`.

    Attributes:
      files: `PairFiles`, or another source of what `decoder` takes.
      decoder: of pairs.
    """

    files: Source
    decoder: PairDecoder

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image, label and name of pair number `index`.

        Raises:
          OSError: a file cannot be read.
          UndecodableError: it is not a pair, see `PairDecoder`.
        """
        return self.decoder(self.files[index])


Splits = tuple[PairSource, PairSource, tuple[str, ...]]
"""Training pairs, validation pairs, class names by label."""


def is_cityscapes(root: pathlib.Path) -> bool:
    """Whether a directory looks like Cityscapes as it is unpacked."""
    return all((root / name).is_dir() for name in _CITYSCAPES_FOLDERS)


def is_pairs(root: pathlib.Path) -> bool:
    """Whether a directory looks like one of image and mask pairs."""
    return all((root / name).is_dir() for name in _PAIR_FOLDERS[:2])


def load_cityscapes(root: pathlib.Path, decoder: Decoder = decode) -> Splits:
    """Cityscapes with fine annotations, as it is unpacked; see the module.

    Args:
      root: the directory.
      decoder: of images.

    Raises:
      ValueError: folders, images or masks are missing.
    """
    pairs = PairDecoder(len(CITYSCAPES), cityscapes=True, decoder=decoder)
    _require_directory(root, *_CITYSCAPES_FOLDERS)
    sources = []
    for split in _SPLITS:
        images = _files(root, pathlib.Path("leftImg8bit") / split, "*/*_leftImg8bit.png")
        masks = [
            path.replace("leftImg8bit/", "gtFine/", 1).removesuffix("_leftImg8bit.png")
            + "_gtFine_labelIds.png"
            for path in images
        ]
        sources.append(PairSource(_paired(root, images, masks), pairs))
    return sources[0], sources[1], tuple(entry.name for entry in CITYSCAPES)


def load_pairs(root: pathlib.Path, decoder: Decoder = decode) -> Splits:
    """A folder of image and mask pairs; see the module.

    Args:
      root: the directory.
      decoder: of images.

    Raises:
      ValueError: folders, class names, images or masks are missing.
    """
    _require_directory(root, *_PAIR_FOLDERS)
    classes = _class_names(root)
    sources = []
    for split in _SPLITS:
        below = pathlib.Path(split) / "images"
        images = [path for path in _files(root, below, "*") if path.lower().endswith(SUFFIXES)]
        if not images:
            raise ValueError(
                f"{root / below} holds no images; their names end in {first_few(SUFFIXES)}"
            )
        by_stem: dict[str, str] = {}
        for path in _files(root, pathlib.Path(split) / "masks", "*"):
            other = by_stem.setdefault(pathlib.Path(path).stem, path)
            if other != path:
                raise ValueError(f"{root}: {other} and {path} are two masks of one image")
        masks = [
            by_stem.get(pathlib.Path(path).stem, f"{split}/masks/{pathlib.Path(path).stem}.png")
            for path in images
        ]
        pairs = PairDecoder(len(classes), decoder=decoder)
        sources.append(PairSource(_paired(root, images, masks), pairs))
    return sources[0], sources[1], classes


def _class_names(root: pathlib.Path) -> tuple[str, ...]:
    """The names in `classes.txt`, by label."""
    listed = root / "classes.txt"
    if not listed.is_file():
        raise ValueError(
            f"{root} has no classes.txt; write the name of every class into it, one per line, "
            "label 0 first"
        )
    try:
        text = listed.read_text("utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{listed} is not UTF-8: {error}") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not 2 <= len(names) <= IGNORE - 1:
        raise ValueError(f"{listed} has {len(names)} names; give 2 to {IGNORE - 1}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{listed} repeats {first_few(twice)}; two labels need two names")
    return names


def _paired(root: pathlib.Path, images: list[str], masks: list[str]) -> PairFiles:
    if absent := [mask for mask in masks if not (root / mask).is_file()]:
        raise ValueError(
            f"{len(absent):,} of {len(images):,} images have no mask: {root} lacks "
            f"{first_few(absent, 3)}"
        )

    def encoded(paths: list[str]) -> np.ndarray:
        return np.array([os.fsencode(path) for path in paths])

    return PairFiles(root, encoded(images), encoded(masks))


def _files(root: pathlib.Path, below: pathlib.Path, pattern: str) -> list[str]:
    """Paths below `root`, in order; at least one."""
    found = sorted(
        path.relative_to(root).as_posix()
        for path in (root / below).glob(pattern)
        if not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise ValueError(f"{root / below} has no files {pattern}")
    return found


def _require_directory(root: pathlib.Path, *below: str) -> None:
    if absent := [name for name in below if not (root / name).is_dir()]:
        raise ValueError(f"{root} has no folder {first_few(absent)}; see docs/segmentation.md")


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"
