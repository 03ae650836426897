"""Small images and a short training loop, for the examples beside this file."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import repvgg_jax as rv

Images = tuple[np.ndarray, np.ndarray]

SMALL = rv.Variant(
    "small", depths=(2, 2), channels=(16, 32), stem_channels=16, strides=(1, 2), stem_stride=1
)
"""A RepVGG for images of 8x8 pixels."""


def load() -> tuple[Images, Images]:
    """Handwritten digits, (images, labels) to train on and to validate: 1437 and 360 of them."""
    images, labels = load_digits(return_X_y=True)
    images = np.float32(images.reshape(-1, 8, 8, 1) / 8 - 1)
    order = np.random.default_rng(0).permutation(len(images))
    train, validation = order[360:], order[:360]
    return (images[train], labels[train]), (images[validation], labels[validation])


def init(model: Any, images: np.ndarray, seed: int = 0) -> Any:
    """Variables of a model."""
    return jax.jit(model.init)(jax.random.key(seed), images[:1])


def fit(
    loss: Callable[[Any, Any], tuple[jax.Array, Any]],
    variables: Any,
    data: Any,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> Any:
    """Trains with AdamW and a cosine schedule.

    Args:
      loss: takes variables and a batch; returns the loss and the new `{"batch_stats": …}`.
      variables: `{"params": …, "batch_stats": …}` to start from.
      data: arrays with an axis of images first; a batch has the same structure.
      steps: of training.
      batch_size: images per step.
      learning_rate: at its peak.

    Returns:
      The trained variables.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)

    @jax.jit
    def step(variables: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        def of_params(params: Any) -> tuple[jax.Array, Any]:
            return loss({**variables, "params": params}, batch)

        gradients, new = jax.grad(of_params, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **new, "params": params}, state

    rng = np.random.default_rng(0)
    count = len(jax.tree.leaves(data)[0])
    state = optimizer.init(variables["params"])
    for _ in range(steps):
        chosen = rng.choice(count, batch_size, replace=False)
        batch = jax.tree.map(lambda array, chosen=chosen: array[chosen], data)
        variables, state = step(variables, state, batch)
    return variables


def classification_loss(model: Any) -> Callable[[Any, Images], tuple[jax.Array, Any]]:
    """The mean cross-entropy of (images, labels), for `fit`."""

    def loss(variables: Any, batch: Images) -> tuple[jax.Array, Any]:
        images, labels = batch
        logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    return loss


def accuracy(model: Any, variables: Any, data: Images) -> float:
    """The share of images whose class is right."""
    images, labels = data
    logits = jax.jit(model.apply)(variables, images)
    return float((jnp.argmax(logits, -1) == labels).mean())
