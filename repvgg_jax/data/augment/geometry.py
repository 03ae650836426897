"""Operations that move pixels: one affine warp serves shears, translations and rotations."""

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.kinds import Choice, Kind

GEOMETRY_KINDS = frozenset(
    {Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y, Kind.ROTATE}
)
RESAMPLINGS = ("bilinear", "bicubic", "random")
"""`random`: one of the two by chance, for every image and operation."""


def warp(images: jax.Array, choice: Choice, fill: tuple[int, ...], resampling: str) -> jax.Array:
    """Pillow's `Image.transform(size, AFFINE, …)` and `Image.rotate`; uint8 as `images`.

    Shears and translations start from the image's corner, rotations from its middle. Images
    whose kind is not geometric stay as they are, bit for bit.

    Args:
      images: uint8 (images, height, width, channels), at most 4 channels.
      choice: kind, argument and resampling of each.
      fill: of each channel, where the source lies outside the image.
      resampling: one of `RESAMPLINGS`, of the whole program: `random` reads 16 pixels for each
        one, `bilinear` 4.
    """
    count, height, width, channels = images.shape
    across, down = source_coordinates(choice, height, width)
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    column, row = jnp.floor(across - 0.5), jnp.floor(down - 0.5)
    right, below = across - 0.5 - column, down - 0.5 - row
    left, top = column.astype(jnp.int32), row.astype(jnp.int32)

    # A pixel's channels travel as one number of 32 bits: a read for each, not for each channel.
    packed = jax.lax.bitcast_convert_type(
        jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, 4 - channels))), jnp.uint32
    ).reshape(count, height * width)

    def read(rows: int, columns: int) -> jax.Array:
        """float32 (images, height, width, channels) of source pixels, repeated at the edges."""
        index = jnp.clip(top + rows, 0, height - 1) * width + jnp.clip(left + columns, 0, width - 1)
        found = jnp.take_along_axis(
            packed, index.reshape(count, -1), axis=1, mode="promise_in_bounds"
        )
        pixels = jax.lax.bitcast_convert_type(found, jnp.uint8)[..., :channels]
        return pixels.reshape(images.shape).astype(jnp.float32)

    right, below = right[..., None], below[..., None]

    def linear_row(rows: int) -> jax.Array:
        return _line(read(rows, 0), read(rows, 1), right)

    def cubic_row(rows: int) -> jax.Array:
        return _cubic(read(rows, -1), read(rows, 0), read(rows, 1), read(rows, 2), right)

    def linear() -> jax.Array:
        return _line(linear_row(0), linear_row(1), below)

    def cubic() -> jax.Array:
        return _cubic(cubic_row(-1), cubic_row(0), cubic_row(1), cubic_row(2), below)

    if resampling == "random":
        values = jnp.where(choice.cubic[:, None, None, None], cubic(), linear())
    else:
        values = cubic() if resampling == "bicubic" else linear()
    moved = jnp.clip(values, 0, 255).astype(jnp.uint8)  # by cutting off, as Pillow
    outside = np.array(fill, np.uint8).reshape(1, 1, 1, -1)
    return jnp.where(inside[..., None], moved, outside)


def source_coordinates(choice: Choice, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Where each pixel comes from: columns and rows, float32 (images, height, width).

    Edges of the image are at 0 and at its size, so a pixel's middle is at a half. What is
    added to a pixel's own place is computed by itself, for float32's sake.
    """
    amount = choice.argument

    def of(kind: Kind, value: jax.Array) -> jax.Array:
        return jnp.where(choice.kind == kind, value, 0.0)[:, None, None]

    angle = jnp.deg2rad(amount)
    less = of(Kind.ROTATE, jnp.cos(angle) - 1)
    turn = of(Kind.ROTATE, jnp.sin(angle))
    column = (jnp.arange(width, dtype=jnp.float32) + 0.5)[None, None, :]
    row = (jnp.arange(height, dtype=jnp.float32) + 0.5)[None, :, None]
    from_middle, from_centre = column - width / 2, row - height / 2
    across = less * from_middle - turn * from_centre
    across += of(Kind.SHEAR_X, amount) * row + of(Kind.TRANSLATE_X, amount * width)
    down = turn * from_middle + less * from_centre
    down += of(Kind.SHEAR_Y, amount) * column + of(Kind.TRANSLATE_Y, amount * height)
    return column + across, row + down


# Both in Pillow's order of operations, which returns equal neighbours exactly.
def _line(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    return first + (second - first) * share


def _cubic(
    before: jax.Array, first: jax.Array, second: jax.Array, after: jax.Array, share: jax.Array
) -> jax.Array:
    square = 2 * (before - first) + second - after
    cube = -before + first - second + after
    return first + share * (-before + second + share * (square + share * cube))
