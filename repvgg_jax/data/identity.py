"""What tells two data sets apart: names of classes, numbers of images and a fingerprint."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.sources import Source
from repvgg_jax.segmentation.labels import IGNORE
from repvgg_jax.text import first_few

logger = logging.getLogger(__name__)

_SAMPLED = 64  # images of a source without file names that are read for its fingerprint


@dataclasses.dataclass(frozen=True)
class SplitIdentity:
    """What is known of one split.

    Attributes:
      images: number of images.
      per_class: number of images by label; empty if only reading all of them would tell.
      fingerprint: digest of labels and file names; of some images where there are no names.
    """

    images: int
    per_class: tuple[int, ...]
    fingerprint: str

    @classmethod
    def of(cls, source: Source, classes: int) -> Self:
        """The identity of a source with so many classes."""
        labels = getattr(source, "labels", None)
        counts = () if labels is None else np.bincount(labels, minlength=classes).tolist()
        return cls(len(source), tuple(counts), fingerprint(source))

    def difference(self, other: Self, classes: Sequence[str]) -> str:
        """What `other` has instead, in words; empty if nothing differs."""
        if self.fingerprint == other.fingerprint:
            return ""
        if self.images == other.images and self.per_class == other.per_class:
            return f"{self.images:,} images, but other ones"
        changed = [
            f"{name} {before:,} -> {now:,}"
            for name, before, now in zip(classes, self.per_class, other.per_class, strict=False)
            if before != now
        ]
        more = f" ({first_few(changed)})" if changed else ""
        return f"{self.images:,} -> {other.images:,} images{more}"


@dataclasses.dataclass(frozen=True)
class DataIdentity:
    """What is known of a data set.

    Attributes:
      train: of the training images.
      evaluation: of the validation images.
    """

    train: SplitIdentity
    evaluation: SplitIdentity

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """The identity of a data set."""
        count = len(dataset.classes)
        return cls(
            SplitIdentity.of(dataset.train, count), SplitIdentity.of(dataset.evaluation, count)
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def class_counts(source: Source, classes: int) -> np.ndarray:
    """Number of images by label, int64 (classes,); reads all images if the source has no labels."""
    labels = labels_of(source)
    return np.bincount(labels[labels >= 0], minlength=classes)


def labels_of(source: Source) -> np.ndarray:
    """The labels of all images, int64, -1 for those that cannot be read.

    Reads all images if the source has no labels.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        logger.info("counting the images of each class: reading all %s", f"{len(source):,}")
        labels = [_label(source, index) for index in range(len(source))]
    return np.asarray(labels, np.int64)


def _label(source: Source, index: int) -> int:
    try:
        return int(source[index]["label"])
    except OSError:
        return -1


def fingerprint(source: Source) -> str:
    """A digest of a source: 16 hexadecimal digits, whatever machine it is on.

    It covers the number of images, and labels and file names where the source holds them, but
    not the contents of files. Without file names, it covers some images spread over the source.
    """
    digest = hashlib.sha256(str(len(source)).encode())
    labels, names = getattr(source, "labels", None), getattr(source, "names", None)
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, np.int32).tobytes())
    if names is not None:
        digest.update(b"\0".join(os.fsencode(name) for name in np.asarray(names).tolist()))
    else:
        last = len(source) - 1
        for index in sorted({round(last * i / (_SAMPLED - 1)) for i in range(_SAMPLED)}):
            digest.update(_content(source, index))
    return digest.hexdigest()[:16]


def _content(source: Source, index: int) -> bytes:
    """An example as bytes; an unreadable one has none, and is reported where it is used."""
    if index < 0:
        return b""
    try:
        example = source[index]
    except (OSError, UndecodableError):
        return b"unreadable"
    image = example["encoded"] if "encoded" in example else np.asarray(example["image"]).tobytes()
    label = np.asarray(example["label"])
    if label.ndim:
        return label.tobytes() + image
    return b"%d:%b" % (int(label), image)


@dataclasses.dataclass(frozen=True)
class Relabeled:
    """A source with other labels.

    Attributes:
      source: the images.
      new: the label that replaces each of the source's.
    """

    source: Source
    new: tuple[int, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The example of the source, with the new label."""
        example = self.source[index]
        label = np.asarray(example["label"])
        if label.ndim:
            table = np.full(256, IGNORE, np.uint8)
            table[: len(self.new)] = self.new
            return {**example, "label": table[label]}
        return {**example, "label": np.int32(self.new[int(label)])}

    @property
    def labels(self) -> np.ndarray | None:
        """The new labels, if the source knows its own without reading images."""
        labels = getattr(self.source, "labels", None)
        return None if labels is None else np.asarray(self.new, np.int32)[labels]

    @property
    def names(self) -> np.ndarray | None:
        """File names, if the source knows them."""
        return getattr(self.source, "names", None)


def with_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """The data set with the classes of a network, matched by their names.

    Args:
      dataset: whose classes are all among them.
      classes: names by label of the network; those without images are allowed.

    Raises:
      ValueError: a class of the data set that the network does not have.
    """
    if tuple(classes) == dataset.classes:
        return dataset
    labels = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in dataset.classes if name not in labels]:
        raise ValueError(
            f"{dataset.name} has {len(unknown)} classes that the network "
            f"does not: {first_few(unknown)}"
        )
    if len(labels) < len(classes) or len(set(dataset.classes)) < len(dataset.classes):
        raise ValueError(
            f"classes of {dataset.name} cannot be matched by name: some have the same name"
        )
    new = tuple(labels[name] for name in dataset.classes)
    return dataclasses.replace(
        dataset,
        train=Relabeled(dataset.train, new),
        evaluation=Relabeled(dataset.evaluation, new),
        classes=tuple(classes),
    )


def class_difference(network: Sequence[str], data: Sequence[str]) -> str:
    """How two lists of class names differ, in words; empty if they are the same."""
    network, data = tuple(network), tuple(data)
    if network == data:
        return ""
    missing = [name for name in network if name not in set(data)]
    added = [name for name in data if name not in set(network)]
    if not missing and not added:
        label = next(i for i, (a, b) in enumerate(zip(network, data, strict=False)) if a != b)
        return (
            f"the same names in another order: label {label} is {data[label]!r}, "
            f"not {network[label]!r}"
        )
    parts = [f"{len(network)} classes -> {len(data)}"] if len(network) != len(data) else []
    parts += [f"missing: {first_few(missing)}"] if missing else []
    parts += [f"new: {first_few(added)}"] if added else []
    return "; ".join(parts)
