"""The optimizer and the learning rate by step."""

from collections.abc import Sequence
from typing import Any

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax.reparam import BUILT_IN, BlockSpec, decay_mask, rep_optimizer, repopt_search
from repvgg_jax.train.scales import Scales
from repvgg_jax.train.settings import OptimizerSettings
from repvgg_jax.weights.tree import in_head

REFERENCE_BATCH = 256  # images; learning rates are stated for this batch


def make_optimizer(
    settings: OptimizerSettings,
    *,
    batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
    offset: int = 0,
    blocks: Sequence[BlockSpec] = (),
    scales: Scales | None = None,
) -> optax.GradientTransformation:
    """The gradient transformation that `config.optimizer` describes.

    Clipping comes first, on the gradient of the loss alone. SGD is PyTorch's: decay is added
    to the gradient, then momentum, then the learning rate. AdamW decouples decay from the
    gradient. Scales multiply gradients before all that, and directions of AdamW before decay.

    Args:
      settings: of the optimizer.
      batch_size: images per step, of all devices together.
      steps_per_epoch: whole batches in the training images.
      total_steps: step at which the run ends.
      offset: steps by which the schedule is ahead.
      blocks: of the network, some norms of which may decay; empty for the built-in ones.
      scales: of a RepOptimizer, or None.
    """
    rate = schedule(
        settings,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        offset=offset,
    )

    def mask(params: Any) -> Any:
        known = tuple(blocks) or BUILT_IN
        return decay_mask(params, equivalent_l2=settings.equivalent_l2, blocks=known)

    clipping = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    heads = []
    if settings.head_factor != 1:  # so that states of runs without it keep their structure
        heads = [optax.masked(optax.scale(settings.head_factor), _is_head)]
    moments = {"b1": settings.b1, "b2": settings.b2, "eps": settings.epsilon}
    decay = optax.add_decayed_weights(settings.weight_decay, mask=mask)
    if settings.name == "adamw" and scales is not None:
        adam = rep_optimizer(repopt_search(), scales, optax.scale_by_adam(**moments), rule="adamw")
        return optax.chain(adam, decay, optax.scale_by_learning_rate(rate), *heads)
    if settings.name == "adamw":
        adamw = optax.adamw(rate, **moments, weight_decay=settings.weight_decay, mask=mask)
        return optax.chain(*clipping, adamw, *heads)
    sgd = optax.sgd(rate, momentum=settings.momentum, nesterov=settings.nesterov)
    if scales is not None:
        return optax.chain(rep_optimizer(repopt_search(), scales, optax.chain(decay, sgd)), *heads)
    return optax.chain(*clipping, decay, sgd, *heads)


def _is_head(params: Any) -> Any:
    """Whether each parameter belongs to a classifier; of a segmenter, to all but the backbone."""
    leaves = flatten_dict(params)
    if "backbone" in params:
        return unflatten_dict({path: path[0] != "backbone" for path in leaves})
    return unflatten_dict({path: in_head(("params", *path)) for path in leaves})


def schedule(
    settings: OptimizerSettings,
    *,
    batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
    offset: int = 0,
) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0, then the schedule of that name.

    The peak is `learning_rate` for a batch of 256 images and proportional to the batch.
    `cosine`, `linear` and `poly` reach 0 at the last step, `poly` as the share of steps that are
    left to the power of `power`; `step` multiplies by `step_factor` every `step_epochs` epochs,
    counted from the start of the run. With `offset`, the rate at step n is that of step
    n + `offset` of a schedule that is `offset` steps longer.
    """
    peak = settings.learning_rate * batch_size / REFERENCE_BATCH
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    left = max(1, total_steps + offset - warmup)
    every = max(1, round(settings.step_epochs * steps_per_epoch))
    falls = optax.exponential_decay(peak, every, settings.step_factor, staircase=True)
    schedules: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, left),
        "linear": optax.linear_schedule(peak, 0.0, left),
        "poly": optax.polynomial_schedule(peak, 0.0, settings.power, left),
        "step": lambda count: falls(count + warmup),
        "constant": optax.constant_schedule(peak),
    }
    chosen = schedules[settings.schedule]
    if warmup:
        chosen = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), chosen], [warmup])
    if not offset:
        return chosen
    return lambda count: chosen(count + offset)
