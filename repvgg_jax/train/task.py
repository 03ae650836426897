"""What a network is trained for, as a value: a loss and the sums that its metrics come from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Sums = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an image.

    Attributes:
      num_classes: how many there are.
      label_smoothing: share of the target that goes to all classes evenly.
      auxiliary_weight: of the loss of each auxiliary head.
    """

    num_classes: int
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.0

    def targets(self, labels: jax.Array) -> jax.Array:
        """What training aims at: smoothed probabilities (images, classes) of labels (images,)."""
        one_hot = jax.nn.one_hot(labels, self.num_classes)
        return optax.smooth_labels(one_hot, self.label_smoothing)

    def loss(
        self, logits: jax.Array, auxiliary: Mapping[str, jax.Array], targets: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The loss to minimise, and the batch's metrics.

        An image counts as right where the class with the largest target wins.

        Args:
          logits: (images, classes).
          auxiliary: logits of the auxiliary heads, by head; may be empty.
          targets: probabilities (images, classes).
        """
        main = optax.softmax_cross_entropy(logits, targets).mean()
        heads = [optax.softmax_cross_entropy(head, targets).mean() for head in auxiliary.values()]
        loss = main + self.auxiliary_weight * sum(heads, start=jnp.zeros_like(main))
        return loss, {"loss": loss, "accuracy": _in_top(1, logits, targets.argmax(-1)).mean()}

    def evaluate(self, logits: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """Sums over the images of a batch that its `mask` keeps.

        `loss` is without smoothing, so that it is comparable between recipes; `accuracy` and
        `top5` (of more than five classes) count the images whose label is among the one and
        five likeliest;
        `class_count` and `class_accuracy` (classes,) are the same by label.
        """
        mask, labels = batch["mask"].astype(jnp.float32), batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = _in_top(1, logits, labels) * mask
        by_label = jax.nn.one_hot(labels, self.num_classes) * mask[:, None]
        sums = {
            "count": mask.sum(),
            "loss": (loss * mask).sum(),
            "accuracy": right.sum(),
            "class_count": by_label.sum(axis=0),
            "class_accuracy": (by_label * right[:, None]).sum(axis=0),
        }
        if self.num_classes > 5:
            sums["top5"] = (_in_top(5, logits, labels) * mask).sum()
        return sums


def _in_top(k: int, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the label's logit is among the k largest; of equal ones the first counts."""
    classes = jnp.arange(logits.shape[-1])[None]
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    ahead = (logits > of_label) | ((logits == of_label) & (classes < labels[:, None]))
    # Nothing is ahead of what is not a number, nor is that ahead of anything.
    return ((ahead.sum(-1) < k) & ~jnp.isnan(logits).any(-1)).astype(jnp.float32)
