"""Data sets that TFDS prepared as ArrayRecord files, read without TensorFlow."""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from repvgg_jax import text
from repvgg_jax.data.decoding import Decoder, decode
from repvgg_jax.data.masks import PairDecoder, PairSource
from repvgg_jax.data.sources import Splits
from repvgg_jax.segmentation.labels import CITYSCAPES

_OPEN_THREADS = 32  # that count records of shards; remote storage answers slowly


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
      label: the feature that holds the class, or a mask.
      file_name: the feature that names the image, or None.
      shards: in the order of the examples.
      masks: whether `label` holds an image with a class per pixel.
    """

    examples: Sequence[Any]
    split: str
    image: str
    label: str
    file_name: str | None
    shards: tuple[ShardSlice, ...]
    masks: bool = False

    def __len__(self) -> int:
        """Number of images."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image's bytes, its label or mask, and its file's name or its number.

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
        found = {"encoded": example[self.image], "name": name}
        if self.masks:
            return {**found, "mask": example[self.label], "mask_name": f"{self.label} of {name}"}
        return {**found, "label": int(example[self.label])}

    def _location(self, index: int) -> str:
        for shard in self.shards:
            if index < shard.take:
                return f"record {shard.skip + index} of {shard.path.name}"
            index -= shard.take
        raise IndexError(index)


def load_tfds(
    name: str,
    *,
    directory: str,
    train_split: str,
    eval_split: str,
    mask: str = "",
    num_classes: int = 0,
    decoder: Decoder = decode,
) -> Splits:
    """Training images, validation images and class names.

    Args:
      name: in TFDS, e.g. `imagenet2012` or `imagenette/320px-v2`.
      directory: where it was prepared; empty for the default of TFDS.
      train_split: in the syntax of TFDS, e.g. `train[:90%]`.
      eval_split: in the same syntax.
      mask: the feature that holds a class per pixel; empty for a class per image.
      num_classes: of a mask whose feature does not tell; 0 is an error then.
      decoder: of images with masks; others are decoded where they are cropped.

    Raises:
      ValueError: not prepared there, not as ArrayRecord, no such split, shards that are missing,
        damaged or cut short, or not one image and one class, or mask, per example.
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
    if mask:
        _check_mask(builder, mask)
    image = _only_feature(builder, tfds.features.Image, "image", besides=mask)
    label = mask or _only_feature(builder, tfds.features.ClassLabel, "class")
    known = ("file_name", "image_id") if mask else ("file_name",)
    file_name = next((name for name in known if name in builder.info.features), None)

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
        encoded = {name: tfds.decode.SkipDecoding() for name in (image, mask) if name}
        examples = builder.as_data_source(split=split, decoders=encoded)
        return TfdsSource(examples, split, image, label, file_name, shards, bool(mask))

    train, evaluation = source(train_split, "train_split"), source(eval_split, "eval_split")
    if not mask:
        return train, evaluation, tuple(builder.info.features[label].names)
    cityscapes = builder.info.name == "cityscapes"  # whose masks hold ids of all classes
    classes = (
        tuple(entry.name for entry in CITYSCAPES)
        if cityscapes
        else _mask_classes(builder, mask, num_classes)
    )
    pairs = PairDecoder(len(classes), cityscapes, decoder)
    return PairSource(train, pairs), PairSource(evaluation, pairs), classes


def _check_mask(builder: Any, mask: str) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [name for name, of in features.items() if isinstance(of, tfds.features.Image)]
    if mask not in images or features[mask].shape[-1] != 1:
        listed = ", ".join(f"{name} {features[name].shape}" for name in images)
        raise ValueError(
            f"config.data.mask={mask!r}: {builder.info.full_name} has no image of one channel of "
            f"that name; its images: {listed}"
        )


def _mask_classes(builder: Any, mask: str, num_classes: int) -> tuple[str, ...]:
    """Names of the classes of a mask: the feature's own, or numbers."""
    feature = builder.info.features[mask]
    count = getattr(feature, "num_classes", None) or num_classes
    if not count:
        raise ValueError(
            f"{builder.info.full_name} does not tell how many classes {mask} has; set "
            f"config.data.num_classes to the largest label and 1 more"
        )
    if getattr(feature, "num_classes", None):
        return tuple(feature.names)
    return tuple(f"class {label}" for label in range(count))


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


def _only_feature(builder: Any, kind: type, what: str, *, besides: str = "") -> str:
    found = [
        name
        for name, feature in builder.info.features.items()
        if isinstance(feature, kind) and name != besides
    ]
    if len(found) != 1:
        hint = ""
        if what == "image" and len(found) == 2 and not besides:
            hint = "; config.data.mask names the one that has a class per pixel"
        named = f" ({', '.join(found)})" if found else ""
        raise ValueError(
            f"{builder.info.full_name}: {len(found)} features of type {what}{named}; there must be "
            f"one{hint}"
        )
    return found[0]


def _string(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
