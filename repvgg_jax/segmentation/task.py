"""Segmentation as a task: targets, loss, what is counted per batch, and what follows from it.

The counterpart of `repvgg_jax.train.step.Classification`, under the same names, so that a loop
needs to know neither.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.segmentation.inference import WHOLE, Protocol, scores
from repvgg_jax.segmentation.labels import IGNORE
from repvgg_jax.segmentation.loss import (
    AUXILIARY_WEIGHT,
    pixel_cross_entropy,
    pixel_losses,
    segmentation_loss,
)
from repvgg_jax.segmentation.metrics import Scores, confusion

Sums = Mapping[str, jax.Array]

EXAMPLES = 4
"""Images in the picture of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """One label per pixel.

    Attributes:
      num_classes: number of classes.
      auxiliary_weight: weight of the auxiliary head's loss.
      ignore: the label of pixels that do not count.
      protocol: of evaluation.
    """

    num_classes: int
    auxiliary_weight: float = AUXILIARY_WEIGHT
    ignore: int = IGNORE
    protocol: Protocol = WHOLE

    each = "pixel"
    """What has a class."""

    headline = "miou"
    """The metric that says how good a network is."""

    names: ClassVar = {"miou": "mIoU", "accuracy": "pixel accuracy"}
    """Metrics in words: the metric of `headline`, and one beside it."""

    def targets(self, labels: jax.Array) -> jax.Array:
        """What the loss takes: int32 labels (images, height, width)."""
        return labels.astype(jnp.int32)

    def loss(
        self, logits: jax.Array, auxiliary: Mapping[str, jax.Array], targets: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The loss to minimize, and the batch's metrics: loss and pixel accuracy.

        Args:
          logits: (images, height, width, classes).
          auxiliary: logits of the auxiliary head, by name; may be empty.
          targets: labels (images, height, width).
        """
        loss = segmentation_loss(
            logits,
            auxiliary,
            targets,
            auxiliary_weight=self.auxiliary_weight,
            ignore=self.ignore,
        )
        labeled = targets != self.ignore
        right = labeled & (logits.argmax(-1) == targets)
        return loss, {"loss": loss, "accuracy": right.sum() / jnp.maximum(labeled.sum(), 1)}

    def outputs(self, network: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
        """What evaluation compares with labels: averaged class scores of every pixel."""
        return scores(network, images, self.num_classes, self.protocol)

    def evaluate(self, outputs: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """Counts over the images of a batch that its `mask` keeps.

        `count` is the number of images, `pixels` of labeled pixels, `loss` the sum of their cross
        entropies, and `confusion` the matrix of labels by predictions.

        Args:
          outputs: as `outputs` gives them.
          batch: `label` (images, height, width) and `mask` (images,).
        """
        mask = batch["mask"]
        labels = jnp.where(mask[:, None, None], self.targets(batch["label"]), self.ignore)
        pixels = (labels != self.ignore).sum()
        mean = pixel_cross_entropy(self._logits(outputs), labels, ignore=self.ignore)
        return {
            "count": mask.sum(),
            "pixels": pixels,
            "loss": mean * pixels,
            "confusion": confusion(
                outputs.argmax(-1), labels, self.num_classes, ignore=self.ignore
            ),
        }

    def _logits(self, outputs: jax.Array) -> jax.Array:
        if self.protocol.average == "probabilities":
            return jnp.log(jnp.maximum(outputs, jnp.finfo(outputs.dtype).tiny))
        return outputs

    def per_image(self, outputs: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """For each image, the mean loss of its labeled pixels and the share predicted correctly."""
        labels = self.targets(batch["label"])
        loss, counted = pixel_losses(self._logits(outputs), labels, ignore=self.ignore)
        right = counted & (outputs.argmax(-1) == labels)
        pixels = jnp.maximum(counted.sum((1, 2)), 1)
        return {"loss": loss.sum((1, 2)) / pixels, "accuracy": right.sum((1, 2)) / pixels}

    def means(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Metrics of a data set from the counts of its batches; integers add up exactly.

        Returns:
          `loss`, `accuracy` (of pixels) and `miou`; `class_iou` and `class_accuracy` (classes,),
          NaN for a class that does not occur; `images`, the number counted; `confusion` of all
          pixels.
        """
        total = {
            name: np.sum([np.asarray(part[name], exact_type(part[name])) for part in parts], axis=0)
            for name in parts[0]
        }
        found = Scores(total["confusion"])
        return {
            "loss": np.asarray(total["loss"] / max(int(total["pixels"]), 1)),
            "accuracy": np.asarray(found.pixel_accuracy),
            "miou": np.asarray(found.miou(absent=self.protocol.absent)),
            "class_iou": found.iou,
            "class_accuracy": found.class_accuracy,
            "confusion": found.matrix,
            "images": np.asarray(total["count"], np.int64),
        }

    def examples(self, outputs: jax.Array, batch: Mapping[str, Any]) -> Mapping[str, jax.Array]:
        """The first images of a batch with labels and predictions, all uint8."""
        shown = {name: batch[name][:EXAMPLES] for name in ("image", "label", "mask")}
        return {**shown, "prediction": outputs[:EXAMPLES].argmax(-1).astype(jnp.uint8)}

    def draw(
        self, examples: Mapping[str, np.ndarray], classes: Sequence[str]
    ) -> Callable[[Any], None] | None:
        """A function that draws `examples` to a file, as `pictures.grid`; None if all are blank."""
        kept = np.flatnonzero(examples["mask"])
        if not kept.size:
            return None
        images, labels, found = (
            [examples[name][i] for i in kept] for name in ("image", "label", "prediction")
        )

        def draw(path: Any) -> None:
            from repvgg_jax.segmentation.pictures import grid

            grid(images, labels, found, classes).savefig(path, format="png")

        return draw


def exact_type(values: Any) -> type:
    """The type in which sums of a batch, counts or others, are added up over a data set."""
    return np.int64 if np.issubdtype(np.asarray(values).dtype, np.integer) else np.float64
