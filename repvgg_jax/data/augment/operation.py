"""One operation on every image of a batch, each image its own, in one program.

A `vmap` of a `switch` would compute every operation for every image. Here an image passes
through one table, one blend, one warp and one cut-out, of which all but its own leave it alone.
"""

from collections.abc import Set

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.colour import BLEND_KINDS, blended, turn_hue
from repvgg_jax.data.augment.cutout import cut_out
from repvgg_jax.data.augment.geometry import GEOMETRY_KINDS, warp
from repvgg_jax.data.augment.kinds import Choice, Kind
from repvgg_jax.data.augment.tables import TABLE_KINDS, look_up, make_tables

COLOUR_KINDS = frozenset({Kind.COLOR, Kind.HUE})
"""Operations that need three channels."""


def operate(
    images: jax.Array,
    choice: Choice,
    *,
    possible: Set[Kind],
    fill: tuple[int, ...] = (128, 128, 128),
    resampling: str = "bilinear",
) -> jax.Array:
    """Applies to each image what was chosen for it.

    Args:
      images: uint8 (images, height, width, channels).
      choice: one operation an image.
      possible: kinds that can occur; the program holds what these need and no more.
      fill: see `warp`.
      resampling: see `warp`.

    Returns:
      uint8, the same shape.
    """
    kind, argument = choice.kind, choice.argument
    if possible & TABLE_KINDS:
        images = look_up(images, make_tables(images, kind, argument, possible))
    if possible & BLEND_KINDS:
        images = blended(images, kind, argument, possible)
    if Kind.HUE in possible:
        images = turn_hue(images, jnp.where(kind == Kind.HUE, argument, 0.0))
    if possible & GEOMETRY_KINDS:
        images = warp(images, choice, fill, resampling)
    if Kind.CUTOUT in possible:
        images = cut_out(images, choice)
    return images


def operate_in_turn(
    images: jax.Array,
    choices: Choice,
    *,
    possible: Set[Kind],
    fill: tuple[int, ...] = (128, 128, 128),
    resampling: str = "bilinear",
) -> jax.Array:
    """Several operations one after the other, compiled once.

    Args:
      images: uint8 (images, height, width, channels).
      choices: fields of shape (images, operations).
      possible: as for `operate`, of all of them together.
      fill: as for `operate`.
      resampling: as for `operate`.
    """

    def step(images: jax.Array, choice: Choice) -> tuple[jax.Array, None]:
        changed = operate(images, choice, possible=possible, fill=fill, resampling=resampling)
        return changed, None

    turns = Choice(*(field.swapaxes(0, 1) for field in choices))
    return jax.lax.scan(step, images, turns)[0]
