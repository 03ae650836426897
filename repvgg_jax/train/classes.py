"""Whether a data set is the one that a network was trained on.

Labels are numbers, and a data set decides which number a class has. After a folder was renamed,
added or removed, the numbers of others are shifted, and nothing but the names shows it.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.identity import (
    DataIdentity,
    SplitIdentity,
    class_difference,
    with_classes,
)
from repvgg_jax.train.workdir import RunMetadata
from repvgg_jax.weights import Weights
from repvgg_jax.weights.tree import in_head, is_classifier

logger = logging.getLogger(__name__)

FLAG = "--other_data"


def for_network(
    dataset: Dataset, classes: Sequence[str], *, owner: str, other_data: bool
) -> Dataset:
    """The data set, with the labels of a network.

    Args:
      dataset: to evaluate or to train the network on.
      classes: names by label that the network was trained with; empty if unknown.
      owner: what the network is, for messages.
      other_data: match other classes by their names.

    Raises:
      ValueError: other classes, or another order of them, without `other_data`; or classes that
        the network does not have.
    """
    difference = class_difference(classes, dataset.classes) if classes else ""
    if not difference:
        return dataset
    if not other_data:
        missing = [name for name in dataset.classes if name not in set(classes)]
        advice = (
            "give the data it was trained on, or fine-tune it with --init_from in another --workdir"
            if missing
            else f"give the data it was trained on, or {FLAG} to match the classes by name"
        )
        raise ValueError(f"{dataset.name} has other classes than {owner}: {difference}; {advice}")
    matched = with_classes(dataset, classes)
    logger.info("classes of %s are matched by name: %s", dataset.name, difference)
    return matched


def for_resuming(
    dataset: Dataset, metadata: RunMetadata | None, *, owner: str, other_data: bool
) -> Dataset:
    """The data set of a run that is resumed.

    Args:
      dataset: that of the settings.
      metadata: of the run; None if an older version began it.
      owner: the run, for messages.
      other_data: accept other images, and match classes by name.

    Raises:
      ValueError: other classes or other images, without `other_data`.
    """
    if metadata is None:
        return dataset
    matched = for_network(dataset, metadata.classes, owner=owner, other_data=other_data)
    difference = _difference(metadata, matched)
    if difference and not other_data:
        raise ValueError(
            f"the images of {dataset.name} are not those that {owner} began with: {difference}; "
            f"restore them, or give {FLAG} to go on with these"
        )
    if difference:
        logger.info("going on with other images: %s", difference)
    return matched


def note_other_images(dataset: Dataset, metadata: RunMetadata, *, owner: str) -> None:
    """Warns if the validation images are not those that a run was evaluated on."""
    if metadata.data is None:
        return
    now = SplitIdentity.of(dataset.evaluation, len(dataset.classes))
    if difference := metadata.data.evaluation.difference(now, metadata.classes):
        logger.warning(
            "the validation images of %s are not those of %s: %s", dataset.name, owner, difference
        )


def _difference(metadata: RunMetadata, dataset: Dataset) -> str:
    if metadata.data is None:
        return ""
    now = DataIdentity.of(dataset)
    parts = {
        "training": metadata.data.train.difference(now.train, metadata.classes),
        "validation": metadata.data.evaluation.difference(now.evaluation, metadata.classes),
    }
    return "; ".join(f"{name}: {text}" for name, text in parts.items() if text)


def fit_head(weights: Weights, names: Sequence[str], classes: Sequence[str]) -> tuple[Weights, str]:
    """Weights whose head has the classes of a data set, in its order, or no head.

    The head stays if names and order are the same, is reordered if only the order differs, and is
    left out for a fresh one if the names differ: a head that was trained for other classes would
    otherwise pass for a fitting one if their number is the same.

    Args:
      weights: to start from.
      names: its classes by label; empty if unknown, then only their number counts.
      classes: those of the data set.

    Returns:
      The weights, and what was done, in words.
    """
    if not names or not weights.num_classes or tuple(names) == tuple(classes):
        known = (
            ""
            if names or weights.num_classes != len(classes)
            else ("the weights do not name their classes, which are taken to be those of the data")
        )
        return weights, known
    leaves: dict[tuple[str, ...], Any] = flatten_dict(weights.variables)
    heads = {path for path in leaves if in_head(path)}
    if sorted(names) == sorted(classes) and len(set(names)) == len(names):
        order = [list(names).index(name) for name in classes]
        moved = {
            path: np.asarray(leaves[path])[..., order] for path in heads if is_classifier(path)
        }
        variables = unflatten_dict({**leaves, **moved})
        return dataclasses.replace(weights, variables=variables), "head reordered by class names"
    kept = unflatten_dict({path: leaf for path, leaf in leaves.items() if path not in heads})
    text = f"other classes ({class_difference(names, classes)})"
    return dataclasses.replace(weights, variables=kept, num_classes=0), text
