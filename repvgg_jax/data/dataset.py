"""A data set: its images, which of them are bad, and `load`, with the table of data sets."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from repvgg_jax.data.clutter import load_clutter
from repvgg_jax.data.decoding import Decoder, decode
from repvgg_jax.data.images import CenterCrop, RandomResizedCrop
from repvgg_jax.data.joint_crop import JointCrop, WholeImage
from repvgg_jax.data.masks import PairSource, load_cityscapes, load_pairs
from repvgg_jax.data.records import Manifest, load_records
from repvgg_jax.data.scenes import SceneSource, load_digits_scenes
from repvgg_jax.data.settings import DataSettings, height_width
from repvgg_jax.data.sources import ArraySource, Source, Splits, load_digits, load_fake, load_folder
from repvgg_jax.data.splits import hold_out, named_splits, tfds_splits
from repvgg_jax.data.tfds_records import load_tfds
from repvgg_jax.data.transforms import FAILURES, EvalCrop, EvalTransform, TrainCrop
from repvgg_jax.text import did_you_mean, one_line, plural

logger = logging.getLogger(__name__)


class BadImages:
    """The images that this process could not read or decode: each is logged once, all count.

    The first file of several pages or frames is logged, too.

    Attributes:
      allowed: `config.data.max_bad`; one more raises.
      decoder: that could not.
      whole: that an image with a label per pixel did not fit.
    """

    def __init__(
        self, allowed: int = 0, decoder: Decoder = decode, whole: WholeImage | None = None
    ):
        self.allowed = allowed
        self.decoder = decoder
        self.whole = whole
        self._met: dict[tuple[str, int], str] = {}
        self._met_frames = False

    def report(self, source: Source, split: str, reports: np.ndarray) -> None:
        """Records the bad images of a batch.

        Args:
          source: where they are.
          split: `training` or `validation`.
          reports: int64 (images, 3), see `Element`.

        Raises:
          ValueError: more than are allowed; names the one too many, with the reason.
        """
        for first, count, several in reports[reports[:, 1:].any(-1)].tolist():
            for number in range(first, first + count):
                self._add(source, split, number % len(source))
            if several and not self._met_frames:
                self._met_frames = True
                number = (first + count) % len(source)
                name = source[number].get("name", f"number {number}")
                logger.warning(
                    "%s image %s holds several pages or frames; the first is used, as of all such "
                    "files (said once)",
                    split,
                    name,
                )

    def _add(self, source: Source, split: str, number: int) -> None:
        if (split, number) in self._met:
            return
        line = f"{split} image {self._why(source, number)}"
        self._met[split, number] = line
        count = len(self._met)
        if count > self.allowed:
            others = f", after {count - 1} more that are named above" if count > 1 else ""
            raise ValueError(
                f"{line}{others}; config.data.max_bad={self.allowed} such images are allowed, "
                f"repair or remove it, or allow more; python -m repvgg_jax.data.check finds all"
            )
        what = "the next image takes its place" if split == "training" else "it is left out"
        logger.warning(
            "%s; %s (%d of at most %s)",
            line,
            what,
            count,
            plural(self.allowed, "bad image"),
        )

    def _why(self, source: Source, number: int) -> str:
        """Name and reason, found by trying once more."""
        name = f"number {number}"
        try:
            example: Any = source[number]
            name = example.get("name", name)
            if "encoded" in example:
                self.decoder(example["encoded"])
            elif self.whole is not None:
                self.whole(example)
        except FAILURES as error:
            return f"{name} cannot be decoded: {one_line(error, 500)}"
        return f"{name} could not be decoded, although now it can: look for a failing disk"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run trains on and is evaluated on.

    Attributes:
      name: as in `config.data.source`.
      train: training images.
      evaluation: validation images.
      image_shape: (height, width, channels) of training images.
      eval_shape: (height, width, channels) of validation images.
      classes: class names by label.
      train_crop: random crop of training images; None takes them as they are.
      eval_crop: center crop of validation images; None takes them as they are.
      masks: whether labels are uint8 (height, width), a class per pixel, and not a class per image.
      workers: processes that read; 0 reads in this one.
      threads: per process that reads.
      bad_images: those met so far, and how many are allowed.
      sampling: of training images, see `repvgg_jax.data.sampling`.
    """

    name: str
    train: Source
    evaluation: Source
    image_shape: tuple[int, int, int]
    eval_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train_crop: TrainCrop | None = None
    eval_crop: EvalCrop | None = None
    masks: bool = False
    workers: int = 0
    threads: int = 1
    bad_images: BadImages = dataclasses.field(default_factory=BadImages)
    sampling: str = "uniform"

    def evaluation_images(self, count: int) -> np.ndarray:
        """The first validation images as evaluation sees them: uint8 (count, *eval_shape).

        Those that cannot be decoded are left out.

        Raises:
          ValueError: none of them can.
        """
        count = min(count, len(self.evaluation))
        return self._examples(self.evaluation, range(count), f"the first {count} validation")[0]

    def spread_examples(
        self, count: int, *, training: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images from all over a split, in even distances, as evaluation sees them.

        Those that cannot be decoded are left out.

        Args:
          count: of images, at most.
          training: those of training instead of validation, without augmentation.

        Returns:
          uint8 (count, *eval_shape), and int32 labels (count,), or uint8 (count, height, width) of
          pixels.

        Raises:
          ValueError: none of them can be decoded.
        """
        source = self.train if training else self.evaluation
        count = min(count, len(source))
        what = f"{count} {'training' if training else 'validation'}"
        return self._examples(source, [i * len(source) // count for i in range(count)], what)

    def _examples(
        self, source: Source, numbers: Sequence[int], what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        transform = EvalTransform(source, self.eval_crop, self.eval_shape, self.masks)
        examples = [transform(number)[0] for number in numbers]
        found = [example for example in examples if example["mask"]]
        if not found:
            raise ValueError(f"none of {what} images of {self.name} can be decoded")
        return (
            np.stack([example["image"] for example in found]),
            np.stack([example["label"] for example in found]),
        )


def _load_tfds(name: str, settings: DataSettings, training: bool) -> Splits:
    train, evaluation = tfds_splits(settings, training=training)
    return load_tfds(
        name,
        directory=settings.directory,
        train_split=train,
        eval_split=evaluation,
        mask=settings.mask,
        num_classes=settings.num_classes,
        decoder=decoder_of(settings),
    )


def _load_folder(path: str, settings: DataSettings, training: bool) -> Splits:
    root = pathlib.Path(path).expanduser()
    splits = named_splits(lambda split: (root / split).is_dir(), settings, training=training)
    return load_folder(root, splits=splits, allow_empty=settings.allow_empty)


def _load_records(path: str, settings: DataSettings, training: bool) -> Splits:
    root = pathlib.Path(path).expanduser()
    manifest = Manifest.read(root)

    def has(split: str) -> bool:
        shards = manifest.splits.get(split, ())
        return bool(shards) and (training or all((root / shard.file).exists() for shard in shards))

    splits = named_splits(has, settings, training=training)
    return load_records(root, decoder_of(settings), manifest=manifest, splits=splits)


_LOADERS: Mapping[str, Callable[[str, DataSettings, bool], Splits]] = {
    "digits": lambda _, settings, training: load_digits(),
    "clutter": lambda _, settings, training: load_clutter(),
    "fake": lambda _, settings, training: load_fake(),
    "tfds:": _load_tfds,
    "folder:": _load_folder,
    "records:": _load_records,
    "scenes": lambda _, settings, training: load_digits_scenes(),
    "cityscapes:": lambda path, settings, training: load_cityscapes(
        pathlib.Path(path).expanduser(), decoder_of(settings)
    ),
    "masks:": lambda path, settings, training: load_pairs(
        pathlib.Path(path).expanduser(), decoder_of(settings)
    ),
}

BUILT_IN = tuple(name for name in _LOADERS if not name.endswith(":"))
"""Data sets that come with the package, of images of one size."""

LOCATED = tuple(name.removesuffix(":") for name in _LOADERS if name.endswith(":"))
"""Kinds of data sets whose name or directory follows a colon."""

_SOURCES = (
    "digits, clutter, fake, tfds:NAME, folder:DIRECTORY, records:DIRECTORY; with a class per pixel "
    "scenes, cityscapes:DIRECTORY, masks:DIRECTORY, records:DIRECTORY, tfds:NAME"
)


def decoder_of(settings: DataSettings) -> Decoder:
    """The decoder that `config.data` describes."""
    return Decoder(settings.max_pixels, settings.background, settings.white)


def load(settings: DataSettings, *, training: bool = True) -> Dataset:
    """Loads the data set that `config.data` describes.

    Args:
      settings: `config.data`.
      training: False for evaluation alone: without training images, the validation images take
        their place.

    Raises:
      ValueError: unknown or missing data, or a setting that does not fit them.
    """
    name = settings.source
    kind, colon, location = name.partition(":")
    if kind + colon not in _LOADERS or (colon and not location):
        hint = did_you_mean(kind, [key.rstrip(":") for key in _LOADERS if key != name])
        raise ValueError(
            f"unknown data set {name!r} in config.data.source; {hint}there are: {_SOURCES}"
        )
    if settings.mask and kind != "tfds":
        raise ValueError(
            f"config.data.mask={settings.mask!r} names a feature of tfds:NAME, but "
            f"config.data.source is {name}"
        )
    train, evaluation, classes = _LOADERS[kind + colon](location, settings, training)
    for split, source in (("training", train), ("validation", evaluation)):
        if not len(source):
            raise ValueError(f"{name} has no {split} images")
    masks = isinstance(train, (PairSource, SceneSource))
    if masks and len(settings.mean) != 3:
        raise ValueError(f"config.data.mean={settings.mean}: images of {name} have 3 channels")
    if settings.num_classes and settings.num_classes != len(classes):
        raise ValueError(
            f"config.data.num_classes={settings.num_classes}, but {name} has {len(classes)} "
            f"classes; 0 takes the number from the data"
        )
    train_size, eval_size = settings.train_size, settings.size_of_evaluation
    if isinstance(train, ArraySource):
        height, width, channels = train.images.shape[1:]
    elif isinstance(train, SceneSource):
        height, width, channels = train.size, train.size, 3
    elif train_size:
        height = width = 0
        channels = 3
    else:
        raise ValueError(
            f"config.data.train_size=0, but the images of {name} differ in size; "
            f"--config.data.train_size=224 is usual for ImageNet"
        )
    if settings.holdout:
        train, evaluation = hold_out(train, settings.holdout)
    decoder = decoder_of(settings)
    train_crop: TrainCrop = RandomResizedCrop(settings.crop_scale, settings.crop_ratio, decoder)
    eval_crop: EvalCrop | None = None
    if masks:
        red, green, blue = (255 * value for value in settings.mean)
        fill = (red, green, blue)
        train_crop = JointCrop(**settings.masks.plain(), fill=fill)
        eval_crop = WholeImage(height_width(eval_size), fill) if eval_size else None
    elif eval_size:
        eval_crop = CenterCrop(eval_size, settings.eval_crop, decoder)
    return Dataset(
        name=name,
        train=train,
        evaluation=evaluation,
        image_shape=(*(height_width(train_size) if train_size else (height, width)), channels),
        eval_shape=(*(height_width(eval_size) if eval_size else (height, width)), channels),
        classes=classes,
        train_crop=train_crop if train_size else None,
        eval_crop=eval_crop,
        masks=masks,
        workers=settings.workers,
        threads=settings.threads,
        bad_images=BadImages(
            settings.max_bad, decoder, eval_crop if isinstance(eval_crop, WholeImage) else None
        ),
        sampling=settings.sampling,
    )
