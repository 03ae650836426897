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

    def loss(
        self, logits: jax.Array, auxiliary: Mapping[str, jax.Array], batch: Mapping[str, Any]
    ) -> tuple[jax.Array, Sums]:
        """The loss to minimise, and the batch's metrics.

        Args:
          logits: (images, classes).
          auxiliary: logits of the auxiliary heads, by head; may be empty.
          batch: holds `label` (images,).
        """
        main = self._cross_entropy(logits, batch["label"]).mean()
        heads = [self._cross_entropy(head, batch["label"]).mean() for head in auxiliary.values()]
        loss = main + self.auxiliary_weight * sum(heads, start=jnp.zeros_like(main))
        return loss, {"loss": loss, "accuracy": _correct(logits, batch["label"]).mean()}

    def evaluate(self, logits: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """Sums over the images of a batch that its `mask` keeps.

        Without smoothing, so that the loss is comparable between recipes.
        """
        mask = batch["mask"].astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {
            "count": mask.sum(),
            "loss": (loss * mask).sum(),
            "accuracy": (_correct(logits, batch["label"]) * mask).sum(),
        }

    def _cross_entropy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = jax.nn.one_hot(labels, self.num_classes)
        return optax.softmax_cross_entropy(
            logits, optax.smooth_labels(targets, self.label_smoothing)
        )


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == labels).astype(jnp.float32)
