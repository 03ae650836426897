"""Everything that a training step changes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct


class TrainState(struct.PyTreeNode):
    """The state between two steps. No random state: keys are `fold_in(seed, step)`.

    Attributes:
      step: steps taken, int32.
      params: parameters, float32.
      batch_stats: running statistics of batch normalisation, float32.
      opt_state: the optimiser's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """The state before the first step; pure, so `jax.jit` and `jax.eval_shape` take it."""
    variables = model.init(key, jnp.zeros((1, *image_shape)))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )
