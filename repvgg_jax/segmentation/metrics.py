"""Intersection over union and pixel accuracy from one confusion matrix of a whole data set.

Counts are integers, so the numbers do not depend on how images are split into batches, devices or
processes. The definitions are those of the Cityscapes evaluator.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.segmentation.labels import IGNORE


def confusion(
    predictions: jax.Array, labels: jax.Array, num_classes: int, *, ignore: int = IGNORE
) -> jax.Array:
    """Counts of pixels by label (rows) and prediction (columns).

    Args:
      predictions: classes, integers (…).
      labels: classes or `ignore`, integers (…), fewer than 2^31 in one call.
      num_classes: number of classes.
      ignore: the label of pixels that do not count.

    Returns:
      int32 (classes, classes); add up batches in int64, e.g. as `np.asarray(…, np.int64)`.
    """
    labels = labels.astype(jnp.int32).reshape(-1)
    place = labels * num_classes + predictions.astype(jnp.int32).reshape(-1)
    counted = (labels != ignore) & (labels < num_classes)
    counts = jnp.zeros(num_classes**2, jnp.int32)
    counts = counts.at[jnp.where(counted, place, num_classes**2)].add(1, mode="drop")
    return counts.reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a confusion matrix says.

    Attributes:
      matrix: int64 (classes, classes), labels by predictions.
    """

    matrix: np.ndarray

    def __post_init__(self) -> None:
        matrix: Any = np.asarray(self.matrix, np.int64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a confusion matrix is square, but this one is {matrix.shape}")
        object.__setattr__(self, "matrix", matrix)

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union by class, float64; NaN for a class that occurs nowhere.

        True positives over true positives, false positives and false negatives. Ignored pixels
        are none of them, whatever is predicted there.
        """
        return _share(self._right, self.matrix.sum(0) + self.matrix.sum(1) - self._right)

    @property
    def class_accuracy(self) -> np.ndarray:
        """Share of each class's pixels that are found, float64; NaN for a class without any."""
        return _share(self._right, self.matrix.sum(1))

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labeled pixels that are right; NaN if there are none."""
        return float(_share(self._right.sum(), self.matrix.sum()))

    def miou(self, *, absent: float | None = None) -> float:
        """Mean of `iou` over the classes.

        Args:
          absent: what a class counts that occurs nowhere. None leaves it out, as the Cityscapes
            evaluator and mmsegmentation do; semseg counts 0.

        Returns:
          NaN if no class occurs.
        """
        iou = self.iou
        if absent is not None and self.matrix.any():
            iou = np.where(np.isnan(iou), absent, iou)
        found = iou[~np.isnan(iou)]
        return float(found.mean()) if found.size else float("nan")

    @property
    def _right(self) -> np.ndarray:
        return np.diagonal(self.matrix)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(part / whole, np.float64)
