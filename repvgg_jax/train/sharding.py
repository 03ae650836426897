"""How the arrays of a run are sharded: on one axis of devices, replicated or split."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from repvgg_jax.train.state import TrainState

# Every device needs all of these for its own images.
_REPLICATED = ("step", "params", "batch_stats")

# Elements below which splitting an array costs more communication than it saves memory.
_SMALL = 1024


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
