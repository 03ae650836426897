"""Data sets that TFDS has prepared as ArrayRecord files; TensorFlow is not needed to read them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One split.

    Attributes:
      examples: random access, images still encoded; can be pickled.
      split: its name.
      image: the feature that holds the image.
      label: the feature that holds the class.
      file_name: the feature that names the image, or None.
    """

    examples: Sequence[Any]
    split: str
    image: str
    label: str
    file_name: str | None

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image's bytes, its label, its file's name or its number."""
        example = self.examples[index]
        name = f"{self.split}[{index}]"
        if self.file_name is not None:
            name = _text(example[self.file_name])
        return {"encoded": example[self.image], "label": int(example[self.label]), "name": name}


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
      ValueError: not prepared there, not as ArrayRecord, no such split, missing shards, or not
        one image and one class an example.
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
            files = [pathlib.Path(file) for file in builder.info.splits[split].filepaths]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"config.data.{setting}={split!r}: tfds:{name} has no such split; there are: "
                f"{', '.join(builder.info.splits)}"
            ) from error
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(
                f"{builder.data_dir}: {len(absent)} of {len(files)} shards of {split!r} missing: "
                f"{', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}"
            )
        examples = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        return TfdsSource(examples, split, image, label, file_name)

    return (
        source(train_split, "train_split"),
        source(eval_split, "eval_split"),
        tuple(builder.info.features[label].names),
    )


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
