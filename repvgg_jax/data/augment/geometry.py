"""Operations that move pixels: one affine warp serves shears, translations and rotations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment import products
from repvgg_jax.data.augment.kinds import Choice, Kind

GEOMETRY_KINDS = frozenset(
    {Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y, Kind.ROTATE}
)
RESAMPLINGS = ("bilinear", "bicubic", "random")
"""`random`: one of the two by chance, for every image and operation."""
_LINEAR, _CUBIC = (0, 1), (-1, 0, 1, 2)  # rows and columns around a place


def warp(images: jax.Array, choice: Choice, fill: tuple[int, ...], resampling: str) -> jax.Array:
    """Pillow's `Image.transform(size, AFFINE, …)` and `Image.rotate`; uint8 as `images`.

    Shears and translations start from the image's corner, rotations from its middle. Images
    whose kind is not geometric stay as they are, bit for bit.

    Args:
      images: uint8 (images, height, width, channels), at most 4 channels.
      choice: kind, argument and resampling of each; rotations by at most 60 degrees.
      fill: of each channel, where the source lies outside the image.
      resampling: one of `RESAMPLINGS`, of the whole program: `random` reads 16 pixels for each
        one, `bilinear` 4.
    """
    _, height, width, _ = images.shape
    column = (jnp.arange(width, dtype=jnp.float32) + 0.5)[None, None, :]
    row = (jnp.arange(height, dtype=jnp.float32) + 0.5)[None, :, None]

    def source(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return source_coordinates(choice, row, column, height, width)

    def interpolate(read: products.Read, right: jax.Array, below: jax.Array) -> jax.Array:
        def linear_row(rows: int) -> jax.Array:
            return _line(read(rows, 0), read(rows, 1), right)

        def cubic_row(rows: int) -> jax.Array:
            before, first, second, after = (read(rows, columns) for columns in _CUBIC)
            return _cubic(before, first, second, after, right)

        def linear() -> jax.Array:
            return _line(linear_row(0), linear_row(1), below)

        def cubic() -> jax.Array:
            before, first, second, after = map(cubic_row, _CUBIC)
            return _cubic(before, first, second, after, below)

        if resampling == "random":
            return jnp.where(choice.cubic[:, None, None, None], cubic(), linear())
        return cubic() if resampling == "bicubic" else linear()

    across, down = source(row)
    taps = _LINEAR if resampling == "bilinear" else _CUBIC
    moved = jax.lax.platform_dependent(
        images,
        tpu=lambda images: products.sample(images, source, interpolate, taps),
        default=lambda images: sample(images, (across, down), interpolate),
    )
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    outside = np.array(fill, np.uint8).reshape(1, 1, 1, -1)
    return jnp.where(inside[..., None], moved, outside)


def sample(
    images: jax.Array,
    source: tuple[jax.Array, jax.Array],
    interpolate: Callable[[products.Read, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Images read at other places, pixel by pixel.

    Args:
      images: uint8 (images, height, width, channels), at most 4 channels.
      source: the columns and rows that pixels come from, float32 (images, height, width).
      interpolate: from source pixels and the shares of the right and the lower one, float32
        (images, height, width, 1), to values shaped as `images`.

    Returns:
      uint8, shaped as `images`; pixels at the edges are repeated beyond them.
    """
    count, height, width, channels = images.shape
    (left, right), (top, below) = map(products.place, source)
    # A pixel's channels travel as one number of 32 bits: a read for each, not for each channel.
    packed = jax.lax.bitcast_convert_type(
        jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, 4 - channels))), jnp.uint32
    ).reshape(count, height * width)

    def read(rows: int, columns: int) -> jax.Array:
        index = jnp.clip(top + rows, 0, height - 1) * width + jnp.clip(left + columns, 0, width - 1)
        found = jnp.take_along_axis(
            packed, index.reshape(count, -1), axis=1, mode="promise_in_bounds"
        )
        pixels = jax.lax.bitcast_convert_type(found, jnp.uint8)[..., :channels]
        return pixels.reshape(images.shape).astype(jnp.float32)

    return products.to_uint8(interpolate(read, right[..., None], below[..., None]))


def source_coordinates(
    choice: Choice, row: jax.Array, column: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Where pixels come from: columns and rows, float32 (images, rows, columns).

    Edges of the image are at 0 and at its size, so a pixel's middle is at a half. What is
    added to a pixel's own place is computed by itself, for float32's sake.

    Args:
      choice: what happens to each image.
      row: of the pixels, float32, of a shape that fits.
      column: likewise.
      height: of the images.
      width: likewise.
    """
    amount = choice.argument

    def of(kind: Kind, value: jax.Array) -> jax.Array:
        return jnp.where(choice.kind == kind, value, 0.0)[:, None, None]

    angle = jnp.deg2rad(amount)
    less = of(Kind.ROTATE, jnp.cos(angle) - 1)
    turn = of(Kind.ROTATE, jnp.sin(angle))
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
