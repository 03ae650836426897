"""The loss of a segmenter: cross entropy of labeled pixels."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from repvgg_jax.segmentation.labels import IGNORE

AUXILIARY_WEIGHT = 0.4


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, *, ignore: int = IGNORE) -> jax.Array:
    """Mean cross entropy of the pixels that have a label; 0 if none has.

    The mean is over the pixels of all images, as in PyTorch's `CrossEntropyLoss` with
    `ignore_index`, on however many devices they are.

    Args:
      logits: (images, height, width, classes).
      labels: integers (images, height, width), classes or `ignore`.
      ignore: the label of pixels that do not count.

    Returns:
      A scalar in at least float32.
    """
    loss, counted = pixel_losses(logits, labels, ignore=ignore)
    return loss.sum() / jnp.maximum(counted.sum(), 1)


def pixel_losses(
    logits: jax.Array, labels: jax.Array, *, ignore: int = IGNORE
) -> tuple[jax.Array, jax.Array]:
    """The cross entropy of every pixel, 0 where it does not count, and whether it counts.

    Args:
      logits: (images, height, width, classes).
      labels: integers (images, height, width), classes or `ignore`.
      ignore: the label of pixels that do not count.
    """
    labels = labels.astype(jnp.int32)
    counted = labels != ignore
    # By comparison, not by index: gathers of single values are slow on accelerators.
    classes = jnp.arange(logits.shape[-1]).reshape(1, 1, 1, -1)
    of_label = jnp.where(classes == labels[..., None], logits, 0).sum(axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - of_label
    return jnp.where(counted, loss, 0), counted


def segmentation_loss(
    logits: jax.Array,
    auxiliary: Mapping[str, jax.Array],
    labels: jax.Array,
    *,
    auxiliary_weight: float = AUXILIARY_WEIGHT,
    ignore: int = IGNORE,
) -> jax.Array:
    """The loss of the network's logits, plus a share of the auxiliary head's.

    Args:
      logits: (images, height, width, classes).
      auxiliary: logits of the auxiliary heads, by name; may be empty.
      labels: as in `pixel_cross_entropy`.
      auxiliary_weight: weight of each auxiliary head's loss; 0.4 in PSPNet.
      ignore: the label of pixels that do not count.
    """
    loss = pixel_cross_entropy(logits, labels, ignore=ignore)
    for head in auxiliary.values():
        loss += auxiliary_weight * pixel_cross_entropy(head, labels, ignore=ignore)
    return loss
