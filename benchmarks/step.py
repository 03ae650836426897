"""The train step that the benchmarks measure: cross entropy, SGD with momentum."""

from typing import Any

import jax
import optax
from flax import linen as nn

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4

Batch = tuple[jax.Array, jax.Array]  # images (images, height, width, 3), labels (images,)


def optimizer() -> optax.GradientTransformation:
    """SGD with momentum and weight decay on everything; what it decays does not change its cost."""
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    )


def init_state(model: nn.Module, images: jax.Array) -> Any:
    """Variables and the optimizer's state; fit for `jax.eval_shape`."""
    variables = model.init(jax.random.key(0), images)
    return variables, optimizer().init(variables["params"])


def make_step(model: nn.Module) -> Any:
    """A pure function (state, batch) -> (state, loss)."""

    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        variables, momentum = state
        images, labels = batch

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, new = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, momentum = optimizer().update(grads, momentum, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, "batch_stats": stats}, momentum), loss

    return step
