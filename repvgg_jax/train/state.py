"""Everything that a training step changes, and how it is sharded: replicated or split."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Every device needs all of these for its own images.
_REPLICATED = ("step", "params", "batch_stats")

# Elements below which splitting an array costs more communication than it saves memory.
_SMALL = 1024


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
    start: Callable[[Any], Any] = lambda params: params,
) -> TrainState:
    """The state before the first step; pure, so `jax.jit` and `jax.eval_shape` take it.

    Args:
      model: the network in training form.
      optimizer: the gradient transformation.
      key: PRNG key of the initial weights.
      image_shape: (height, width, channels) of one image.
      average: whether to keep moving averages.
      start: what becomes of the parameters as they are initialized.
    """
    variables = model.init(key, jnp.zeros((1, *image_shape)))
    variables = {**variables, "params": start(variables["params"])}
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


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """All devices on one axis, `data`.

    Devices of a process are neighbors, so that it reads consecutive images.
    """
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    # Explicit axes, the default, break gathers on a sharded batch.
    return Mesh(np.array(ordered), ("data",), axis_types=(AxisType.Auto,))


def state_sharding(state: TrainState, mesh: Mesh, *, shard_optimizer: bool) -> TrainState:
    """The sharding of every leaf of a state.

    Parameters and statistics are replicated. With `shard_optimizer` everything else (momentum,
    moments, averages of the parameters) is split over the devices: each updates its shard and
    the compiler gathers the new parameters, which is ZeRO stage 1 (Rajbhandari et al., 2020).
    The arithmetic is the same.

    Args:
      state: arrays or shapes.
      mesh: with the axis `data`.
      shard_optimizer: split all but parameters and statistics.
    """

    def sharding(leaf: jax.ShapeDtypeStruct, split: bool) -> NamedSharding:
        return NamedSharding(mesh, split_largest(leaf.shape, mesh) if split else PartitionSpec())

    return TrainState(
        **{
            field.name: jax.tree.map(
                lambda leaf, split=shard_optimizer and field.name not in _REPLICATED: sharding(
                    leaf, split
                ),
                getattr(state, field.name),
            )
            for field in dataclasses.fields(TrainState)
        }
    )


def split_largest(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits the largest axis that the number of devices divides.

    Small arrays, and those without such an axis, are replicated.
    """
    if math.prod(shape) < _SMALL:
        return PartitionSpec()
    divisible = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(["data" if axis == largest else None for axis in range(len(shape))]))
