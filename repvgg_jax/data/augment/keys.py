"""Who draws from which key: one for each stage, and in it one for each image."""

import enum

import jax
import jax.numpy as jnp
import numpy as np


class Stage(enum.Enum):
    """What draws random numbers; the values count down from the top, where no image's index is."""

    FLIP = 2**32 - 1
    POLICY = 2**32 - 2
    JITTER = 2**32 - 3
    ERASE = 2**32 - 4
    MIX = 2**32 - 5


def stage_key(key: jax.Array, stage: Stage) -> jax.Array:
    """The stage's own key, so that switching one stage on leaves the others as they were."""
    return jax.random.fold_in(key, np.uint32(stage.value))


def image_keys(key: jax.Array, count: int) -> jax.Array:
    """Keys (count,); that of an image depends on `key` and on its index in the batch only.

    Not on the size of the batch and not on how it is spread over devices.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count))
