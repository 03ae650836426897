"""Where the arrays of a run lie: on one axis of devices, copied to all or a share on each."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from repvgg_jax.train.state import TrainState

# What every device needs whole for its own images; the step counter is one number.
_REPLICATED = ("step", "params", "batch_stats")

# Numbers below which an array is not worth splitting: gathering it costs more than keeping it.
_SMALL = 1024


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """All devices on one axis, `data`.

    Those of a process lie side by side, so that it reads consecutive images.
    """
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    # Explicit axes, today's default, break gathers on a sharded batch.
    return Mesh(np.array(ordered), ("data",), axis_types=(AxisType.Auto,))


def state_sharding(state: TrainState, mesh: Mesh, *, shard_optimizer: bool) -> TrainState:
    """Where every leaf of a state lies.

    Parameters and statistics are copied to every device. With `shard_optimizer` everything else
    (momentum, moments, averages of the parameters) is split over the devices: each updates
    its share and the compiler gathers the new parameters, which is stage 1 of ZeRO
    (Rajbhandari et al., 2020). The arithmetic is the same.

    Args:
      state: arrays or shapes.
      mesh: with the axis `data`.
      shard_optimizer: whether to split what can be split.
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
    """Splits the largest axis that the devices divide.

    A small array, and one without such an axis, stays whole.
    """
    if math.prod(shape) < _SMALL:
        return PartitionSpec()
    divisible = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(["data" if axis == largest else None for axis in range(len(shape))]))
