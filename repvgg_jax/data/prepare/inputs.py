"""The images to prepare: in ImageNet's tar files, in a class-per-folder tree, or with masks.

Nothing is unpacked: an image in a tar of tars is an offset into the outer file and a size.
"""

import dataclasses
import io
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence

from repvgg_jax import text
from repvgg_jax.data.decoding import Decoder, decode, read_file
from repvgg_jax.data.masks import (
    PairDecoder,
    PairFiles,
    is_cityscapes,
    is_pairs,
    load_cityscapes,
    load_pairs,
)
from repvgg_jax.data.sources import FOLDER_SPLITS, load_folders
from repvgg_jax.files import open_regular

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS = "val_labels.txt"
_DEVKIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
_DEVKIT_BYTES = 1 << 26  # of each of them, at most; the real ones have less than 1 MB


class MissingError(ValueError):
    """Required files do not exist; the message lists them."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An image to prepare.

    Attributes:
      name: `train/n01440764/n01440764_10026.JPEG`.
      label: number of its class.
      file: that holds its bytes.
      offset: of its first byte in `file`.
      size: in bytes; -1 if it is not a readable file.
      mask: the file with its class per pixel; None if it has one class.
      mask_name: as in messages.
      mask_size: in bytes; as `size`.
    """

    name: str
    label: int
    file: pathlib.Path
    offset: int
    size: int
    mask: pathlib.Path | None = None
    mask_name: str = ""
    mask_size: int = 0

    def read(self) -> bytes:
        """The bytes of the encoded image.

        Raises:
          OSError: it cannot be read, or not completely, or is not a regular file.
        """
        with open_regular(self.file) as file:
            file.seek(self.offset)
            content = file.read(max(self.size, 0))
        if len(content) != self.size:
            raise OSError(f"{self.file} ends within {self.name}")
        return content

    def read_mask(self) -> bytes:
        """The bytes of its mask.

        Raises:
          OSError: it cannot be read.
        """
        assert self.mask is not None
        return read_file(self.mask)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The images that are to be prepared.

    Attributes:
      classes: class names by label.
      splits: the images of every split, in the order of their names.
      pairs: decoder of images with masks; None if images have one class each.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[Item]]
    pairs: PairDecoder | None = None


def find(
    root: pathlib.Path,
    *,
    splits: Sequence[str] | None = None,
    allow_empty: bool = False,
    decoder: Decoder = decode,
) -> Inputs:
    """Images of Cityscapes, of image and mask pairs, of a tree of classes, or of ImageNet's tars.

    Args:
      root: the directory.
      splits: folders of a tree of classes; None for `train` and `val`.
      allow_empty: see `load_folder`.
      decoder: of images with masks.

    Raises:
      MissingError: neither; lists all that is missing.
      ValueError: no such directory, or something in it is damaged or does not fit.
    """
    if not root.is_dir():
        raise ValueError(f"--source={root} is not a directory")
    if splits is not None:
        _check_splits(splits)
        return _tree(root, splits, allow_empty)
    if is_cityscapes(root) or is_pairs(root):
        return _pairs(root, decoder)
    if all((root / split).is_dir() for split in FOLDER_SPLITS):
        return _tree(root, FOLDER_SPLITS, allow_empty)
    if missing := _missing_tars(root):
        raise MissingError(
            f"{root} holds neither train/ and val/ with a folder per class, or with images/ and "
            f"masks/, nor Cityscapes, nor ImageNet's files; missing: {'; '.join(missing)}"
        )
    return _tars(root)


def _missing_tars(root: pathlib.Path) -> list[str]:
    missing = []
    if not (root / TRAIN_TAR).is_file():
        missing.append(f"{TRAIN_TAR} (138 GB, image-net.org)")
    if not (root / VAL_TAR).is_file():
        missing.append(f"{VAL_TAR} (6.3 GB, image-net.org)")
    if not (root / DEVKIT).is_file() and not (root / VAL_LABELS).is_file():
        missing.append(
            f"{DEVKIT} (2.5 MB, image-net.org), or {VAL_LABELS}: one line per validation "
            f"image, in the order of their names: the name of its class, e.g. n01440764"
        )
    return missing


def _check_splits(splits: Sequence[str]) -> None:
    wrong = [split for split in splits if not split or split.startswith(".") or "/" in split]
    if wrong or not splits or len(set(splits)) < len(splits):
        raise ValueError(
            f"--splits={','.join(splits)} must be names of folders below --source, each once, e.g. "
            f"train,val,test"
        )


def _tree(root: pathlib.Path, names: Sequence[str], allow_empty: bool) -> Inputs:
    sources, classes = load_folders(root, names, allow_empty=allow_empty)
    splits = {}
    for split, source in zip(names, sources, strict=True):
        splits[split] = [
            Item(
                name=f"{split}/{os.fsdecode(source.names[i])}",
                label=int(source.labels[i]),
                file=source.path(i),
                offset=0,
                size=_size(source.path(i)),
            )
            for i in range(len(source))
        ]
    return Inputs(classes, splits)


def _pairs(root: pathlib.Path, decoder: Decoder) -> Inputs:
    *sources, classes = (load_cityscapes if is_cityscapes(root) else load_pairs)(root, decoder)
    splits = {}
    for split, source in zip(FOLDER_SPLITS, sources, strict=True):
        files = source.files
        assert isinstance(files, PairFiles)
        splits[split] = [
            Item(
                name=name,
                label=0,
                file=root / name,
                offset=0,
                size=_size(root / name),
                mask=root / mask,
                mask_name=mask,
                mask_size=_size(root / mask),
            )
            for name, mask in zip(
                map(os.fsdecode, files.images), map(os.fsdecode, files.masks), strict=True
            )
        ]
    return Inputs(classes, splits, sources[0].decoder)


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a broken link: an image that cannot be read, as reading it will tell
        return -1


def _tars(root: pathlib.Path) -> Inputs:
    train: dict[str, list[tuple[str, int, int]]] = {}
    with open(root / TRAIN_TAR, "rb") as outer:
        for name, offset, size in _members(outer, 0, (root / TRAIN_TAR).stat().st_size, TRAIN_TAR):
            inner = _members(outer, offset, size, f"{name} in {TRAIN_TAR}")
            train[name.removesuffix(".tar")] = sorted(inner)
    classes = tuple(sorted(train))
    if empty := [name for name in classes if not train[name]]:
        raise ValueError(f"{root / TRAIN_TAR}: no images of class {text.first_few(empty)}")
    with open(root / VAL_TAR, "rb") as flat:
        val = sorted(_members(flat, 0, (root / VAL_TAR).stat().st_size, VAL_TAR))
    labels = _val_labels(root)
    if len(labels) != len(val):
        raise ValueError(
            f"{VAL_TAR} holds {len(val):,} images, but there are {len(labels):,} labels for them"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    if unknown := sorted({label for label in labels if label not in numbers}):
        raise ValueError(
            f"validation images of classes that {TRAIN_TAR} lacks: {text.first_few(unknown)}"
        )
    validation = [
        Item(f"val/{label}/{name}", numbers[label], root / VAL_TAR, offset, size)
        for label, (name, offset, size) in zip(labels, val, strict=True)
    ]
    return Inputs(
        classes,
        {
            "train": [
                Item(f"train/{label}/{name}", numbers[label], root / TRAIN_TAR, offset, size)
                for label in classes
                for name, offset, size in train[label]
            ],
            "val": sorted(validation, key=lambda item: item.name),
        },
    )


def _members(
    file: io.BufferedReader, start: int, size: int, title: str
) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file and size of the regular files of a tar within a file."""
    file.seek(start)
    found = []
    try:
        # Headers only: tarfile seeks from one to the next.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    found.append((member.name.rpartition("/")[2], member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{title} is damaged or not downloaded completely: {error}") from error
    if found and found[-1][1] + found[-1][2] > start + size:
        raise ValueError(f"{title} was not downloaded completely: it ends within {found[-1][0]}")
    yield from found


def _val_labels(root: pathlib.Path) -> list[str]:
    if (root / VAL_LABELS).is_file():
        return (root / VAL_LABELS).read_text(errors="replace").split()
    from scipy.io import loadmat

    path = root / DEVKIT
    files = _devkit_files(path)
    try:
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [names[int(number)] for number in files[_DEVKIT_FILES[1]].split()]
    except Exception as error:  # loadmat raises anything
        raise ValueError(
            f"{path} holds other class numbers than ImageNet's, or is damaged "
            f"({type(error).__name__}: {text.one_line(error)}); download it again, or give "
            f"{VAL_LABELS}"
        ) from error


def _devkit_files(path: pathlib.Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name not in _DEVKIT_FILES:
                    continue
                if not member.isfile() or member.size > _DEVKIT_BYTES:
                    raise ValueError(f"{path}: {name} in it is not a file of at most 64 MiB")
                content = tar.extractfile(member)
                assert content is not None  # as of every file
                files[name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not downloaded completely: {text.one_line(error)}; download it "
            f"again, or give {VAL_LABELS}"
        ) from error
    if lacking := [name for name in _DEVKIT_FILES if name not in files]:
        raise ValueError(f"{path} lacks {' and '.join(lacking)}; download it again")
    return files
