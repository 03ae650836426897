"""The optimiser of the paper: SGD with momentum, cosine schedule, masked weight decay."""

from typing import Any

import jax
import optax

REFERENCE_BATCH = 256  # images; learning rates are stated for this batch


def schedule(
    *, learning_rate: float, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to 0 at the last step.

    Args:
      learning_rate: per 256 images; the peak is proportional to the batch.
      batch_size: images of all devices together.
      warmup_steps: steps until the peak.
      total_steps: steps of the whole run.
    """
    peak = learning_rate * batch_size / REFERENCE_BATCH
    cosine = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    if not warmup_steps:
        return cosine
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), cosine], [warmup_steps]
    )


def sgd(
    learning_rate: optax.Schedule, *, momentum: float, nesterov: bool, weight_decay: float
) -> optax.GradientTransformation:
    """PyTorch's SGD: decay is added to the gradient, then momentum, then the learning rate."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )


def decay_mask(params: Any) -> Any:
    """Which parameters decay: kernels, and the scale of identity branches.

    Biases and the scales of other normalisations do not. This is the authors' mask (they
    decay every parameter of more than one axis, and `rbr_identity.weight`).
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [getattr(part, "key", None) for part in path]
        return names[-1] == "kernel" or names[-2:] == ["bn_identity", "scale"]

    return jax.tree_util.tree_map_with_path(decays, params)
