"""The gradient transformation that `config.optimizer` describes.

The paper's is SGD with momentum, a cosine schedule and weight decay on some of the
parameters.
"""

from typing import Any

import optax

from repvgg_jax.reparam import decay_mask
from repvgg_jax.train.settings import OptimizerSettings

REFERENCE_BATCH = 256  # images; learning rates are stated for this batch


def make_optimizer(
    settings: OptimizerSettings, *, batch_size: int, steps_per_epoch: int, total_steps: int
) -> optax.GradientTransformation:
    """The gradient transformation that `config.optimizer` describes.

    Clipping comes first, on the gradient of the loss alone. SGD is PyTorch's: decay is added
    to the gradient, then momentum, then the learning rate. AdamW decouples decay from the
    gradient.

    Args:
      settings: of the optimizer.
      batch_size: images per step, of all devices together.
      steps_per_epoch: whole batches in the training images.
      total_steps: length of the run.
    """
    rate = schedule(
        settings,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )

    def mask(params: Any) -> Any:
        return decay_mask(params, equivalent_l2=settings.equivalent_l2)

    clipping = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    if settings.name == "adamw":
        adamw = optax.adamw(
            rate,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=mask,
        )
        return optax.chain(*clipping, adamw)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=mask)
    sgd = optax.sgd(rate, momentum=settings.momentum, nesterov=settings.nesterov)
    return optax.chain(*clipping, decay, sgd)


def schedule(
    settings: OptimizerSettings, *, batch_size: int, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0, then the schedule of that name.

    The peak is `learning_rate` for a batch of 256 images and proportional to the batch.
    `cosine` and `linear` reach 0 at the last step; `step` multiplies by `step_factor` every
    `step_epochs` epochs, counted from the start of the run.
    """
    peak = settings.learning_rate * batch_size / REFERENCE_BATCH
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    left = max(1, total_steps - warmup)
    every = max(1, round(settings.step_epochs * steps_per_epoch))
    falls = optax.exponential_decay(peak, every, settings.step_factor, staircase=True)
    schedules: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, left),
        "linear": optax.linear_schedule(peak, 0.0, left),
        "step": lambda count: falls(count + warmup),
        "constant": optax.constant_schedule(peak),
    }
    chosen = schedules[settings.schedule]
    if not warmup:
        return chosen
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), chosen], [warmup])
