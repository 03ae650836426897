"""One step of training and of evaluation, as pure functions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from repvgg_jax.data.augment import Augmentation, Normalise
from repvgg_jax.training.state import TrainState
from repvgg_jax.training.task import Classification, Sums

Batch = Mapping[str, Any]


def make_train_step(
    model: nn.Module,
    task: Classification,
    optimizer: optax.GradientTransformation,
    augment: Augmentation,
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Builds `train_step(state, batch) -> (state, metrics)`.

    The mean over a batch that is sharded over devices is the mean over all of it, so one
    function serves one device and many.

    Metrics: the task's, `grad_norm`, and `first_bad_gradient`, the index of the first leaf of
    the parameters whose gradient is not finite, or -1.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        images = augment(key, batch["image"])

        def loss_of(params: Any) -> tuple[jax.Array, tuple[Sums, Any]]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats", "auxiliary"],
            )
            loss, metrics = task.loss(logits, updated.get("auxiliary", {}), batch)
            return loss, (metrics, updated["batch_stats"])

        gradients, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        squares = jnp.stack([jnp.square(g).sum() for g in jax.tree.leaves(gradients)])
        bad = ~jnp.isfinite(squares)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return new_state, {
            **metrics,
            "grad_norm": jnp.sqrt(squares.sum()),
            "first_bad_gradient": jnp.where(bad.any(), bad.argmax(), -1),
        }

    return train_step


def make_eval_step(
    model: nn.Module, task: Classification, normalise: Normalise
) -> Callable[[Any, Batch], Sums]:
    """Builds `eval_step(variables, batch) -> sums`; `variables` in the form of `model`."""

    def eval_step(variables: Any, batch: Batch) -> Sums:
        logits = model.apply(variables, normalise(batch["image"]))
        assert isinstance(logits, jax.Array)
        return task.evaluate(logits, batch)

    return eval_step
