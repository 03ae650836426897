"""The operations of a policy, what was sampled per image, and the random key of each image."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Op(enum.IntEnum):
    """One operation on one image; the comment describes its argument."""

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # number of bits kept, 0 … 8
    SOLARIZE = 5  # threshold, 0 … 256: values from here on are inverted
    SOLARIZE_ADD = 6  # added to values below 128
    BRIGHTNESS = 7  # factor, 1 is the identity, as for the next three
    CONTRAST = 8
    COLOR = 9
    SHARPNESS = 10
    HUE = 11  # fraction of the color circle, -0.5 … 0.5
    SHEAR_X = 12  # columns per row
    SHEAR_Y = 13  # rows per column
    TRANSLATE_X = 14  # fraction of the width
    TRANSLATE_Y = 15  # fraction of the height
    ROTATE = 16  # degrees, counterclockwise
    CUTOUT = 17  # side of the square in pixels


class SampledOps(NamedTuple):
    """The operation sampled for each image; every field has the shape (images,).

    A policy samples several operations per image: fields of shape (operations,) for one image,
    (images, operations) for a batch.

    Attributes:
      op: int32, values of `Op`.
      argument: float32, see `Op`.
      cubic: bool, whether geometric operations resample bicubically instead of bilinearly.
      row: center of a cutout, float32 in [0, 1).
      column: center of a cutout, float32 in [0, 1).
    """

    op: jax.Array
    argument: jax.Array
    cubic: jax.Array
    row: jax.Array
    column: jax.Array


class Stage(enum.Enum):
    """Stages with random numbers of their own.

    The values count down from 2**32 - 1, so that none is the index of an image.
    """

    FLIP = 2**32 - 1
    POLICY = 2**32 - 2
    JITTER = 2**32 - 3
    ERASE = 2**32 - 4
    MIX = 2**32 - 5


def stage_key(key: jax.Array, stage: Stage) -> jax.Array:
    """The key of a stage: enabling one stage does not change what the others sample."""
    return jax.random.fold_in(key, np.uint32(stage.value))


def image_keys(key: jax.Array, count: int) -> jax.Array:
    """Keys (count,), one per image, functions of `key` and of the index in the batch only.

    They depend neither on the batch size nor on how the batch is sharded.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count))
