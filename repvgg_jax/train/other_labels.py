"""Evaluating with labels other than the data's own: ImageNet-V2's numbers, ReaL's sets of labels.

ImageNet-V2 (Recht et al., ICML 2019) names its folders by label, 0 … 999, and folders are sorted
as text. ImageNet-ReaL (Beyer et al., 2020, "Are we done with ImageNet?") gives every validation
image of ImageNet a set of labels, which may be empty; its accuracy is over images with a label, and
any of an image's labels is right.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.identity import Relabeled
from repvgg_jax.data.sources import Source
from repvgg_jax.files import read_json
from repvgg_jax.text import first_few, one_line

NUMBERS = "numbers"
"""The map of classes of data whose classes are named by the labels of the network."""

_OF_IMAGENET = re.compile(r"ILSVRC2012_val_(\d{8})")


def with_class_map(
    dataset: Dataset, class_map: str, classes: Sequence[str], num_classes: int
) -> Dataset:
    """The data set with the classes of a network, matched by a map.

    Args:
      dataset: its images, with a label each.
      class_map: `NUMBERS`, or a JSON file with an object that gives for every class of the data the
        network's, by name or by label; several classes may become one.
      classes: names by label of the network; empty if unknown.
      num_classes: their number.

    Raises:
      ValueError: a map that cannot be read or lacks a class, or a class that the network lacks.
    """
    if dataset.masks:
        raise ValueError(f"--class_map is for classes of images, but {dataset.name} has masks")
    names = tuple(classes) or tuple(map(str, range(num_classes)))
    table = _identity(dataset) if class_map == NUMBERS else _read_map(class_map)
    if missing := [name for name in dataset.classes if name not in table]:
        raise ValueError(
            f"--class_map={class_map} lacks {len(missing)} of {len(dataset.classes)} classes of "
            f"{dataset.name}: {first_few(missing)}"
        )
    labels = {name: label for label, name in enumerate(names)}
    new = []
    for name in dataset.classes:
        target = table[name]
        label = labels.get(target, -1) if isinstance(target, str) else target
        if not 0 <= label < len(names):
            raise ValueError(
                f"--class_map={class_map}: {one_line(name, 60)!r} becomes "
                f"{one_line(target, 60)!r}, which is neither a class of the network nor a "
                f"label from 0 to {len(names) - 1}"
            )
        new.append(label)
    return dataclasses.replace(
        dataset,
        train=Relabeled(dataset.train, tuple(new)),
        evaluation=Relabeled(dataset.evaluation, tuple(new)),
        classes=names,
    )


def _identity(dataset: Dataset) -> Mapping[str, int]:
    wrong = [name for name in dataset.classes if not name.isdecimal()]
    if wrong:
        raise ValueError(
            f"--class_map={NUMBERS} is for classes that are named by labels, e.g. ImageNet-V2's, "
            f"but {dataset.name} has {first_few(wrong)}"
        )
    return {name: int(name) for name in dataset.classes}


def _read_map(path: str) -> Mapping[str, str | int]:
    content = _read(path, "--class_map")
    if not isinstance(content, dict) or not all(
        isinstance(value, (str, int)) and not isinstance(value, bool) for value in content.values()
    ):
        raise ValueError(
            f"--class_map={path} must hold a JSON object from classes of the data to names or "
            f"labels of the network, or be {NUMBERS!r}"
        )
    return content


def _read(path: str, flag: str) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}={path} cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class RealLabels:
    """Sets of labels by image.

    Attributes:
      by_name: labels by the name of a file, without its directories and its suffix; of images
        without names by their number.
      path: of the file that has them.
    """

    by_name: Mapping[str, frozenset[int]]
    path: str

    @classmethod
    def read(cls, path: str, num_classes: int) -> Self:
        """Reads a JSON file: a list in the order of ImageNet's files, or an object by file name.

        Args:
          path: e.g. `real.json` of ImageNet-ReaL.
          num_classes: labels must be below it.

        Raises:
          ValueError: it is neither, or has other labels.
        """
        content = _read(path, "--real_labels")
        if isinstance(content, list):
            content = {f"ILSVRC2012_val_{i:08}": labels for i, labels in enumerate(content, 1)}
        if not isinstance(content, dict) or not all(
            isinstance(labels, list) and all(type(label) is int for label in labels)
            for labels in content.values()
        ):
            raise ValueError(
                f"--real_labels={path} must hold lists of labels: a list of them by number of "
                "ImageNet's validation images, or an object of them by file name"
            )
        found = {_stem(name): frozenset(labels) for name, labels in content.items()}
        for name, labels in found.items():
            if wrong := [label for label in labels if not 0 <= label < num_classes]:
                raise ValueError(
                    f"--real_labels={path}: {name} has the label {wrong[0]}, but the network has "
                    f"{num_classes} classes"
                )
        return cls(found, path)

    def accuracy(
        self, source: Source, predicted: Sequence[np.ndarray], counted: np.ndarray
    ) -> tuple[list[float], int]:
        """The share of images whose predicted class is one of their labels.

        Args:
          source: the images.
          predicted: by network, its classes (images,).
          counted: bool (images,), False where an image cannot be decoded.

        Returns:
          The share by network, and the number of images with a label.

        Raises:
          ValueError: no image has labels in the file.
        """
        sets = [self.by_name.get(name, frozenset()) for name in _names(source)]
        numbers = [i for i, labels in enumerate(sets) if labels and counted[i]]
        if not numbers:
            raise ValueError(
                f"--real_labels={self.path} names none of the {len(sets):,} images, e.g. not "
                f"{first_few(_names(source)[:1])}"
            )
        shares = [float(np.mean([int(each[i]) in sets[i] for i in numbers])) for each in predicted]
        return shares, len(numbers)


def _names(source: Source) -> list[str]:
    """Names of all images; read with the images where the source does not list them."""
    listed = getattr(source, "names", None)
    if listed is not None:
        return [_stem(os.fsdecode(name)) for name in listed]
    return [_stem(str(source[i].get("name", i))) for i in range(len(source))]


def _stem(name: str) -> str:
    found = _OF_IMAGENET.search(name)
    return found[0] if found else pathlib.PurePath(name).stem
