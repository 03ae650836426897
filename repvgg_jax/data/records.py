"""Images in ArrayRecord files, as `python -m repvgg_jax.data.prepare` writes them.

A directory holds `manifest.json` and the shards `train-00000-of-00626.array_record`
… `val-…`, by the names of its splits. A record is a msgpack map of `encoded` (the image file),
`label` and `name`. With a class per pixel, it has `mask` (a PNG of labels) and `mask_name` instead
of `label`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from repvgg_jax import files, text
from repvgg_jax.data.decoding import Decoder, decode
from repvgg_jax.data.masks import PairDecoder, PairSource
from repvgg_jax.data.sources import FOLDER_SPLITS, Splits
from repvgg_jax.typed import typed

MANIFEST = "manifest.json"
VERSION, MASKS_VERSION = 1, 2
"""Versions of a manifest, without and with masks. The first readers know the former only."""

_NAMES = "surrogateescape"  # names of files are bytes, which need not be UTF-8


def pack(*, encoded: bytes, label: int, name: str) -> bytes:
    """A record of an image with a class."""
    return _packed({"encoded": encoded, "label": label, "name": name})


def pack_pair(*, encoded: bytes, mask: bytes, name: str, mask_name: str) -> bytes:
    """A record of an image with a class per pixel."""
    return _packed({"encoded": encoded, "mask": mask, "name": name, "mask_name": mask_name})


def unpack(record: bytes) -> dict[str, Any]:
    """The keyword arguments of `pack` or of `pack_pair`."""
    return msgpack.unpackb(record, unicode_errors=_NAMES)


def _packed(record: Mapping[str, Any]) -> bytes:
    return msgpack.packb(record, unicode_errors=_NAMES)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file of records.

    Attributes:
      file: its name in the directory.
      images: number of records.
      bytes: its size.
      sha256: of the file, hexadecimal.
    """

    file: str
    images: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a directory of records.

    Attributes:
      classes: class names by label.
      splits: the shards of each split, usually `train` and `val`.
      details: how they were made.
      masks: whether there is a class per pixel.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]
    details: dict[str, Any]
    masks: bool = False

    @classmethod
    def read(cls, root: pathlib.Path) -> "Manifest":
        """The manifest of a directory.

        Raises:
          ValueError: there is none, or it cannot be read.
        """
        path = root / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{root} holds no {MANIFEST}: it was not written by python -m "
                f"repvgg_jax.data.prepare, or that has not finished; the same command continues"
            )
        try:
            content = files.read_json(path)
            if content["version"] not in (VERSION, MASKS_VERSION):
                known = f"{VERSION} and {MASKS_VERSION}"
                raise ValueError(f"version {content['version']}, this reads {known}")
            splits = typed(dict[str, tuple[Shard, ...]], content["splits"], "splits")
            classes = typed(tuple[str, ...], content["classes"], "classes")
            details = typed(dict[str, Any], content["details"], "details")
            names = [shard.file for shards in splits.values() for shard in shards]
            if outside := [name for name in names if not files.is_below(name)]:
                raise ValueError(f"shards outside of it: {text.first_few(outside)}")
            masks = content["version"] == MASKS_VERSION
            return cls(classes, splits, details, masks)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; prepare the data again") from error

    def write(self, root: pathlib.Path) -> None:
        """Writes it atomically."""
        content = dataclasses.asdict(self)
        masks = content.pop("masks")
        content = {"version": MASKS_VERSION if masks else VERSION, **content}
        files.write_text(root / MANIFEST, json.dumps(content, indent=1))


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """The records of one split.

    Attributes:
      records: random access to their bytes; picklable.
    """

    records: Sequence[bytes]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes, its label or mask, and its name when it was prepared."""
        try:
            return unpack(self.records[index])
        except (RuntimeError, ValueError) as error:
            raise OSError(f"a damaged record: {error}") from error


def load_records(
    root: pathlib.Path,
    decoder: Decoder = decode,
    *,
    manifest: Manifest,
    splits: tuple[str, str] = FOLDER_SPLITS,
) -> Splits:
    """Training images, validation images and class names.

    Args:
      root: the directory.
      decoder: of images with masks; others are decoded where they are cropped.
      manifest: of the directory.
      splits: of training and of validation; twice the same if there is one only.

    Raises:
      ValueError: no such split, or shards of it missing or cut short.
    """
    for split in splits:
        if split not in manifest.splits:
            raise ValueError(
                f"{root} has no split {split!r}, but {', '.join(manifest.splits)}; "
                f"config.data.train_split and eval_split name them, and prepare --splits makes them"
            )
    check_files(root, {split: manifest.splits[split] for split in splits})
    try:
        train, val = (RecordSource(open_shards(root, manifest.splits[split])) for split in splits)
        if manifest.masks:
            pairs = PairDecoder(len(manifest.classes), decoder=decoder)
            return PairSource(train, pairs), PairSource(val, pairs), manifest.classes
    except RuntimeError as error:
        raise ValueError(
            f"{root} holds a damaged shard, see python -m repvgg_jax.data.prepare "
            f"--verify={root}: {error}"
        ) from error
    return train, val, manifest.classes


def check_files(root: pathlib.Path, splits: Mapping[str, Sequence[Shard]]) -> None:
    """Checks that every shard exists and has the size in the manifest.

    Args:
      root: the directory.
      splits: the shards of some or all splits.

    Raises:
      ValueError: shards are missing or cut short.
    """
    absent, cut = [], []
    for shard in (shard for shards in splits.values() for shard in shards):
        path = root / shard.file
        if not path.is_file():
            absent.append(shard.file)
        elif path.stat().st_size != shard.bytes:
            cut.append(f"{shard.file} ({path.stat().st_size:,} bytes of {shard.bytes:,})")
    for what, names in (("missing", absent), ("of the wrong size", cut)):
        if names:
            total = sum(map(len, splits.values()))
            raise ValueError(
                f"{root}: {len(names)} of {total} shards {what}: {text.first_few(names)}; prepare "
                f"the data again, which keeps the others"
            )


def open_shards(root: pathlib.Path, shards: Sequence[Shard]) -> Sequence[bytes]:
    """Random access to the records of several files, in the order of the files."""
    from grain.sources import ArrayRecordDataSource

    if not shards:  # of which Grain makes no source
        return ()
    return ArrayRecordDataSource([str(root / shard.file) for shard in shards])
