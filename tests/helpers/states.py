"""States of a small network with random values in every leaf."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repvgg_jax import RepVGG, Variant
from repvgg_jax.train.state import TrainState, initial_state

SMALL = Variant("small", (1, 1), (8, 16), 8, strides=(1, 2), stem_stride=1)


@functools.cache
def make_state(
    step: int, *, num_classes: int = 10, clip: bool = False, average: bool = False
) -> TrainState:
    """Random arrays in every leaf, half of the momentum sharded over all devices."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    if clip:
        optimizer = optax.chain(optimizer, optax.trace(0.5))

    def init(key: jax.Array) -> TrainState:
        model = RepVGG(SMALL, num_classes=num_classes)
        return initial_state(model, optimizer, key, (8, 8, 1), average=average)

    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(step)
    state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)
    state = state.replace(step=np.int32(step))
    mesh = Mesh(np.asarray(jax.devices()), "data")

    def sharding(path: tuple, leaf: np.ndarray) -> NamedSharding:
        split = "opt_state" in jax.tree_util.keystr(path) and leaf.ndim and leaf.shape[-1] % 8 == 0
        spec = (None,) * (leaf.ndim - 1) + ("data",) if split else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.device_put(state, jax.tree_util.tree_map_with_path(sharding, state))
