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
      batch_stats: running statistics of batch normalization, float32.
      opt_state: the optimizer's.
      ema: exponential moving averages of `params` and `batch_stats`, under these names; empty
        if there are none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the network that is trained."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def result(self) -> dict[str, Any]:
        """The variables to evaluate and convert: the averages, if there are any."""
        return self.ema or self.variables


def initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    *,
    average: bool = False,
) -> TrainState:
    """The state before the first step; pure, so `jax.jit` and `jax.eval_shape` take it.

    Args:
      model: the network in training form.
      optimizer: the gradient transformation.
      key: PRNG key of the initial weights.
      image_shape: (height, width, channels) of one image.
      average: whether to keep moving averages.
    """
    variables = model.init(key, jnp.zeros((1, *image_shape)))
    return state_from(variables, optimizer, average=average)


def state_from(
    variables: Any, optimizer: optax.GradientTransformation, *, average: bool
) -> TrainState:
    """The state before the first step, starting from these variables."""
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        # Copies: the step may overwrite the buffers of one while it still reads the other.
        ema=jax.tree.map(jnp.copy, variables) if average else {},
    )
