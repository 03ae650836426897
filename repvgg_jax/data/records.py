"""Images in ArrayRecord files, as `python -m repvgg_jax.data.prepare` or TFDS writes them.

Of the former, a directory holds `manifest.json` and the shards `train-00000-of-00626.array_record`
… `val-…`. A record is a msgpack map of `encoded` (the image file), `label` and `name`.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import msgpack

from repvgg_jax import files, text

MANIFEST = "manifest.json"
VERSION = 1
_OPEN_THREADS = 32  # that count records of shards; remote storage answers slowly


def pack(*, encoded: bytes, label: int, name: str) -> bytes:
    """A record."""
    return msgpack.packb({"encoded": encoded, "label": label, "name": name})


def unpack(record: bytes) -> dict[str, Any]:
    """The keyword arguments of `pack`."""
    return msgpack.unpackb(record)


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
      splits: the shards of `train` and of `val`.
      details: how they were made.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]
    details: dict[str, Any]

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
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, this is {VERSION}")
            splits = {
                split: tuple(Shard(**shard) for shard in shards)
                for split, shards in content["splits"].items()
            }
            return cls(tuple(content["classes"]), splits, content["details"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; prepare the data again") from error

    def write(self, root: pathlib.Path) -> None:
        """Writes it atomically."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
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
        """The file's bytes, its label, and its name when it was prepared."""
        try:
            return unpack(self.records[index])
        except (RuntimeError, ValueError) as error:
            raise OSError(f"a damaged record: {error}") from error


def load_records(root: pathlib.Path) -> tuple[RecordSource, RecordSource, tuple[str, ...]]:
    """Training images, validation images and class names.

    Raises:
      ValueError: no finished directory of records, or shards missing or cut short.
    """
    manifest = Manifest.read(root)
    check_files(root, manifest)
    try:
        train, val = (
            RecordSource(open_shards(root, manifest.splits[split])) for split in ("train", "val")
        )
    except RuntimeError as error:
        raise ValueError(
            f"{root} holds a damaged shard, see python -m repvgg_jax.data.prepare "
            f"--verify={root}: {error}"
        ) from error
    return train, val, manifest.classes


def check_files(root: pathlib.Path, manifest: Manifest) -> None:
    """Checks that every shard exists and has the size in the manifest.

    Raises:
      ValueError: shards are missing or cut short.
    """
    absent, cut = [], []
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        path = root / shard.file
        if not path.is_file():
            absent.append(shard.file)
        elif path.stat().st_size != shard.bytes:
            cut.append(f"{shard.file} ({path.stat().st_size:,} bytes of {shard.bytes:,})")
    for what, names in (("missing", absent), ("of the wrong size", cut)):
        if names:
            total = sum(map(len, manifest.splits.values()))
            raise ValueError(
                f"{root}: {len(names)} of {total} shards {what}: {text.first_few(names)}; prepare "
                f"the data again, which keeps the others"
            )


def open_shards(root: pathlib.Path, shards: Sequence[Shard]) -> Sequence[bytes]:
    """Random access to the records of several files, in the order of the files."""
    from grain.sources import ArrayRecordDataSource

    return ArrayRecordDataSource([str(root / shard.file) for shard in shards])


@dataclasses.dataclass(frozen=True)
class ShardSlice:
    """The records of a file of TFDS that belong to a split.

    Attributes:
      path: of the file.
      skip: records of the file before the first one of the split.
      take: records of the split.
      records: of the file.
    """

    path: pathlib.Path
    skip: int
    take: int
    records: int


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One split of a data set that TFDS prepared as ArrayRecord files.

    Reading it does not need TensorFlow.

    Attributes:
      examples: random access, images still encoded; picklable.
      split: its name.
      image: the feature that holds the image.
      label: the feature that holds the class.
      file_name: the feature that names the image, or None.
      shards: in the order of the examples.
    """

    examples: Sequence[Any]
    split: str
    image: str
    label: str
    file_name: str | None
    shards: tuple[ShardSlice, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image's bytes, its label, and its file's name or its number.

        Raises:
          OSError: the record is damaged; names it and its shard.
        """
        try:
            example = self.examples[index]
        except (RuntimeError, ValueError, TypeError) as error:
            raise OSError(f"{self._location(index)} is damaged: {error}") from error
        name = f"{self.split}[{index}]"
        if self.file_name is not None:
            name = _string(example[self.file_name])
        return {"encoded": example[self.image], "label": int(example[self.label]), "name": name}

    def _location(self, index: int) -> str:
        for shard in self.shards:
            if index < shard.take:
                return f"record {shard.skip + index} of {shard.path.name}"
            index -= shard.take
        raise IndexError(index)


def load_tfds(
    name: str, *, directory: str, train_split: str, eval_split: str
) -> tuple[TfdsSource, TfdsSource, tuple[str, ...]]:
    """Training images, validation images and class names.

    Args:
      name: in TFDS, e.g. `imagenet2012` or `imagenette/320px-v2`.
      directory: where it was prepared; empty for the default of TFDS.
      train_split: in the syntax of TFDS, e.g. `train[:90%]`.
      eval_split: in the same syntax.

    Raises:
      ValueError: not prepared there, not as ArrayRecord, no such split, shards that are missing,
        damaged or cut short, or not one image and one class per example.
    """
    import tensorflow_datasets as tfds

    data_dir = directory or str(tfds.core.constants.DATA_DIR)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"tfds:{name} is not prepared in {data_dir}; set config.data.directory to where it is, "
            f"or prepare it with TFDS there (file_format='array_record')"
        ) from error
    file_format = builder.info.file_format
    if file_format != tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"tfds:{name} in {builder.data_dir} is stored as "
            f"{file_format.value if file_format else 'something unknown'}, which has no random "
            f"access; prepare it with file_format='array_record'"
        )
    image = _only_feature(builder, tfds.features.Image, "image")
    label = _only_feature(builder, tfds.features.ClassLabel, "class")
    file_name = "file_name" if "file_name" in builder.info.features else None

    def source(split: str, setting: str) -> TfdsSource:
        try:
            instructions = builder.info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"config.data.{setting}={split!r}: tfds:{name} has no such split; there are: "
                f"{', '.join(builder.info.splits)}"
            ) from error
        shards = tuple(
            ShardSlice(pathlib.Path(of.filename), of.skip, of.take, of.examples_in_shard)
            for of in instructions
        )
        check_tfds_shards(pathlib.Path(builder.data_dir), split, shards)
        examples = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        return TfdsSource(examples, split, image, label, file_name, shards)

    return (
        source(train_split, "train_split"),
        source(eval_split, "eval_split"),
        tuple(builder.info.features[label].names),
    )


def check_tfds_shards(directory: pathlib.Path, split: str, shards: Sequence[ShardSlice]) -> None:
    """Checks that every shard exists and holds as many records as it should.

    Damage within a record is found when it is read.

    Args:
      directory: named in errors.
      split: named in errors.
      shards: its files.

    Raises:
      ValueError: shards are missing, damaged or cut short; names the first of them.
    """
    absent = [shard.path.name for shard in shards if not shard.path.is_file()]
    _refuse(directory, split, len(shards), "missing", absent)
    with concurrent.futures.ThreadPoolExecutor(_OPEN_THREADS) as pool:
        wrong = [line for line in pool.map(_shard_damage, shards) if line]
    _refuse(directory, split, len(shards), "damaged or cut short", wrong)


def _refuse(directory: pathlib.Path, split: str, total: int, what: str, found: list[str]) -> None:
    if found:
        raise ValueError(
            f"{directory}: {len(found)} of {total} shards of {split!r} {what}: "
            f"{text.first_few(found)}; copy them again, or have TFDS prepare the data again"
        )


def _shard_damage(shard: ShardSlice) -> str | None:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(shard.path))
        records = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        return f"{shard.path.name} ({str(error) or 'its end is missing'})"
    if records != shard.records:
        return f"{shard.path.name} ({records:,} records of {shard.records:,})"
    return None


def _only_feature(builder: Any, kind: type, what: str) -> str:
    found = [name for name, feature in builder.info.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"{builder.info.full_name}: {len(found)} features of type {what}; there must be one"
        )
    return found[0]


def _string(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
