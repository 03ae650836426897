"""Data sets that TFDS has prepared as ArrayRecord files; TensorFlow is not needed to read them."""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

OPENERS = 32  # shards whose records are counted at a time; storage far away answers slowly


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a split takes of a file.

    Attributes:
      path: of the file.
      skip: records of it that come before.
      take: records of it that the split has.
      records: in the file.
    """

    path: pathlib.Path
    skip: int
    take: int
    records: int


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One split.

    Attributes:
      examples: random access, images still encoded; can be pickled.
      split: its name.
      image: the feature that holds the image.
      label: the feature that holds the class.
      file_name: the feature that names the image, or None.
      shards: the files, in the order of the examples.
    """

    examples: Sequence[Any]
    split: str
    image: str
    label: str
    file_name: str | None
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image's bytes, its label, its file's name or its number.

        Raises:
          OSError: the record is damaged; names it and its shard.
        """
        try:
            example = self.examples[index]
        except (RuntimeError, ValueError, TypeError) as error:
            raise OSError(f"{self._place(index)} is damaged: {error}") from error
        name = f"{self.split}[{index}]"
        if self.file_name is not None:
            name = _text(example[self.file_name])
        return {"encoded": example[self.image], "label": int(example[self.label]), "name": name}

    def _place(self, index: int) -> str:
        for shard in self.shards:
            if index < shard.take:
                return f"record {shard.skip + index} of {shard.path.name}"
            index -= shard.take
        raise IndexError(index)


def load(
    name: str, *, directory: str, train_split: str, eval_split: str
) -> tuple[TfdsSource, TfdsSource, tuple[str, ...]]:
    """Training images, held-out images and class names.

    Args:
      name: as TFDS knows it, `imagenet2012` or `imagenette/320px-v2`.
      directory: where it was prepared; empty for TFDS's own default.
      train_split: as TFDS writes splits, `train[:90%]` too.
      eval_split: likewise.

    Raises:
      ValueError: not prepared there, not as ArrayRecord, no such split, shards that are missing,
        damaged or cut short, or not one image and one class an example.
    """
    import tensorflow_datasets as tfds

    place = directory or str(tfds.core.constants.DATA_DIR)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=place)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"tfds:{name} is not prepared in {place}; set config.data.directory to where it is, "
            f"or prepare it with TFDS there (file_format='array_record')"
        ) from error
    file_format = builder.info.file_format
    if file_format != tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"tfds:{name} in {builder.data_dir} is stored as "
            f"{file_format.value if file_format else 'something unknown'}, which has no random "
            f"access; prepare it with file_format='array_record'"
        )
    image = _the_only(builder, tfds.features.Image, "image")
    label = _the_only(builder, tfds.features.ClassLabel, "class")
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
            Shard(pathlib.Path(of.filename), of.skip, of.take, of.examples_in_shard)
            for of in instructions
        )
        check_shards(pathlib.Path(builder.data_dir), split, shards)
        examples = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        return TfdsSource(examples, split, image, label, file_name, shards)

    return (
        source(train_split, "train_split"),
        source(eval_split, "eval_split"),
        tuple(builder.info.features[label].names),
    )


def check_shards(place: pathlib.Path, split: str, shards: Sequence[Shard]) -> None:
    """Checks that every shard is there and holds the records that it should.

    Damage within a record shows when that is read; what is found here is that of a whole file.

    Args:
      place: the directory, to say where.
      split: the split, likewise.
      shards: its files.

    Raises:
      ValueError: shards are missing, damaged or cut short; names the first three.
    """
    absent = [shard.path.name for shard in shards if not shard.path.is_file()]
    _refuse(place, split, len(shards), "missing", absent)
    with concurrent.futures.ThreadPoolExecutor(OPENERS) as pool:
        wrong = [line for line in pool.map(_what_is_wrong, shards) if line]
    _refuse(place, split, len(shards), "damaged or cut short", wrong)


def _refuse(place: pathlib.Path, split: str, total: int, what: str, found: list[str]) -> None:
    if found:
        raise ValueError(
            f"{place}: {len(found)} of {total} shards of {split!r} {what}: "
            f"{'; '.join(found[:3])}{' …' if len(found) > 3 else ''}; copy them again, or have "
            f"TFDS prepare the data again"
        )


def _what_is_wrong(shard: Shard) -> str | None:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(shard.path))
        records = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        return f"{shard.path.name} ({str(error) or 'it has no end'})"
    if records != shard.records:
        return f"{shard.path.name} ({records:,} records of {shard.records:,})"
    return None


def _the_only(builder: Any, kind: type, what: str) -> str:
    found = [name for name, feature in builder.info.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"{builder.info.full_name}: {len(found)} features hold a{'n' * (what == 'image')} "
            f"{what}; there must be one"
        )
    return found[0]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
