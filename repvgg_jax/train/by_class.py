"""Accuracy or IoU by class: the worst classes, and what is taken for what."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from matplotlib.figure import Figure

from repvgg_jax.files import replacing
from repvgg_jax.text import one_line

_NUMBERED = 20  # classes up to which the picture has numbers
_NAMED = 60  # classes up to which it has names


@dataclasses.dataclass(frozen=True)
class ByClass:
    """Validation accuracy, or intersection over union, by class.

    Attributes:
      names: by label.
      images: number of images, or of pixels, by label.
      score: by label, a fraction; NaN for a class that does not occur.
      confusion: (classes, classes) number of them by label and predicted class; None if there
        are too many classes.
      score_name: `accuracy` or `IoU`.
      unit: what is counted, `images` or `pixels`.
    """

    names: tuple[str, ...]
    images: np.ndarray
    score: np.ndarray
    confusion: np.ndarray | None
    score_name: str = "accuracy"
    unit: str = "images"

    @classmethod
    def of(cls, names: Sequence[str], means: Mapping[str, np.ndarray]) -> Self:
        """The scores in what `Evaluator` returns."""
        if "class_iou" in means:
            matrix = means["confusion"]
            return cls(tuple(names), matrix.sum(1), means["class_iou"], matrix, "IoU", "pixels")
        return cls(
            tuple(names),
            means["class_images"].astype(np.int64),
            means["class_accuracy"],
            means["confusion"].astype(np.int64) if "confusion" in means else None,
        )

    def worst(self, count: int) -> list[int]:
        """Labels of the classes with the lowest score, the lowest first."""
        known = [label for label in range(len(self.names)) if self.images[label]]
        return sorted(known, key=lambda label: (self.score[label], label))[:count]

    def mistaken_for(self, label: int) -> str:
        """The class that images of class `label` are most often mistaken for, and their share."""
        if self.confusion is None:
            return ""
        row = self.confusion[label].copy()
        row[label] = 0
        if not row.any():
            return ""
        other = int(row.argmax())
        return f"{self.names[other]} ({row[other] / self.images[label]:.0%})"

    def line(self, count: int = 5) -> str:
        """The worst classes on one line."""
        return ", ".join(
            f"{one_line(self.names[label], 40)} {self.score[label]:.1%} of {self.images[label]:,}"
            for label in self.worst(count)
        )

    def pairs(self) -> list[tuple[str, str, int, float]]:
        """Classes that are taken for others: class, other, number, and share of the class's.

        The most frequent ones come first; there are none without a confusion matrix.
        """
        if self.confusion is None:
            return []
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        labels, others = np.nonzero(wrong)
        counts = wrong[labels, others]
        return [
            (
                self.names[labels[i]],
                self.names[others[i]],
                int(counts[i]),
                float(counts[i] / self.images[labels[i]]),
            )
            for i in np.argsort(-counts, kind="stable")
        ]

    def table(self, count: int = 20) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Head and rows of a table of the worst classes."""
        head = ["class", self.unit, self.score_name, "most often taken for"]
        return head, [
            (
                self.names[label],
                f"{self.images[label]:,}",
                f"{self.score[label]:.1%}",
                self.mistaken_for(label),
            )
            for label in self.worst(count)
        ]

    def draw(self, path: pathlib.Path) -> None:
        """Draws the confusion matrix as PNG: a row per class, each adding up to 100 %."""
        if self.confusion is None:
            return
        count = len(self.names)
        shares = self.confusion / np.maximum(1, self.confusion.sum(axis=1, keepdims=True))
        side = min(12.0, 3.2 + 0.32 * min(count, 30))
        figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("predicted class")
        axes.set_ylabel(f"class of the {self.unit[:-1]}")
        if count <= _NAMED:
            labels = [one_line(name, 24) for name in self.names]
            size = 8 if count <= 30 else 5
            axes.set_xticks(range(count), labels, rotation=90, fontsize=size)
            axes.set_yticks(range(count), labels, fontsize=size)
        if count <= _NUMBERED:
            for row, column in np.argwhere(self.confusion):
                axes.text(
                    column,
                    row,
                    f"{self.confusion[row, column]:,}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if shares[row, column] > 0.5 else "#222222",
                )
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
