"""Geometric operations: one affine warp computes shears, translations and rotations."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.base import Op, SampledOps

GEOMETRIC_OPS = frozenset({Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE})
ReadPixel = Callable[[int, int], jax.Array]
"""(row offset, column offset) -> source pixels at that offset, float32."""
_LINEAR, _CUBIC = (0, 1), (-1, 0, 1, 2)  # row and column offsets around a coordinate


def warp(
    images: jax.Array, sampled: SampledOps, fill: tuple[int, ...], resampling: str
) -> jax.Array:
    """Pillow's `Image.transform(size, AFFINE, …)` and `Image.rotate`.

    Shears and translations are relative to the corner of the image, rotations to its center.
    Images with another operation stay bitwise as they are.

    Args:
      images: uint8 (images, height, width, channels), at most 4 channels.
      sampled: operation, argument and resampling per image; rotations by at most 60 degrees.
      fill: value of each channel where the source coordinates are outside the image.
      resampling: `bilinear`, which reads 4 source pixels per pixel, `bicubic`, which reads 16, or
        `random`: one of the two per image, as sampled. For the whole program.

    Returns:
      uint8, shaped as `images`.
    """
    _, height, width, _ = images.shape
    column = (jnp.arange(width, dtype=jnp.float32) + 0.5)[None, None, :]
    row = (jnp.arange(height, dtype=jnp.float32) + 0.5)[None, :, None]

    def source(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return source_coordinates(sampled, row, column, height, width)

    def interpolate(read: ReadPixel, right: jax.Array, below: jax.Array) -> jax.Array:
        def linear_row(rows: int) -> jax.Array:
            return _linear(read(rows, 0), read(rows, 1), right)

        def cubic_row(rows: int) -> jax.Array:
            before, first, second, after = (read(rows, columns) for columns in _CUBIC)
            return _cubic(before, first, second, after, right)

        def bilinear() -> jax.Array:
            return _linear(linear_row(0), linear_row(1), below)

        def bicubic() -> jax.Array:
            before, first, second, after = map(cubic_row, _CUBIC)
            return _cubic(before, first, second, after, below)

        if resampling == "random":
            return jnp.where(sampled.cubic[:, None, None, None], bicubic(), bilinear())
        return bicubic() if resampling == "bicubic" else bilinear()

    across, down = source(row)
    taps = _LINEAR if resampling == "bilinear" else _CUBIC
    moved = jax.lax.platform_dependent(
        images,
        tpu=lambda images: _matmul(images, source, interpolate, taps),
        default=lambda images: _gather(images, (across, down), interpolate),
    )
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    outside = np.array(fill, np.uint8).reshape(1, 1, 1, -1)
    return jnp.where(inside[..., None], moved, outside)


def _gather(
    images: jax.Array,
    source: tuple[jax.Array, jax.Array],
    interpolate: Callable[[ReadPixel, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Samples images at other coordinates, pixel by pixel.

    Args:
      images: uint8 (images, height, width, channels), at most 4 channels.
      source: the columns and rows that pixels come from, float32 (images, height, width).
      interpolate: from source pixels and the weights of the right and the lower one, float32
        (images, height, width, 1), to values shaped as `images`.

    Returns:
      uint8, shaped as `images`; the edge pixels are repeated beyond the edges.
    """
    count, height, width, channels = images.shape
    (left, right), (top, below) = map(_split_coordinate, source)
    # The channels of a pixel are packed into 32 bits: one gather per pixel, not per channel.
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

    return _to_uint8(interpolate(read, right[..., None], below[..., None]))


def _matmul(
    images: jax.Array,
    source: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    interpolate: Callable[[ReadPixel, jax.Array, jax.Array], jax.Array],
    taps: Sequence[int],
) -> jax.Array:
    """Samples images at other coordinates, as one matrix product along each axis, for TPUs.

    A TPU reads an array by tiles of a thousand values, and a single value by a whole tile. A
    product with a one-hot matrix runs on its matrix units instead, and is exact: every sum has one
    term, and bfloat16 represents the integers 0 … 255. For equal coordinates the result is bitwise
    that of `_gather`.

    For every output column and every source row, the first product computes what that source row
    contributes to that column; the second moves it to the output row that takes it. At most two
    output rows may take from one source row in a column, which holds for rotations up to
    60 degrees: both are computed.

    Args:
      images: uint8 (images, height, width, channels).
      source: from output rows, float32 (images or 1, some, width or 1), to the source columns and
        rows, float32 (images, some, width): see `source_coordinates`. Source rows ascend in
        steps of 0, 1 or 2.
      interpolate: from source pixels and the weights of the right and the lower one, float32
        (images, some, 1, width), to values (images, some, channels, width).
      taps: row and column offsets that `interpolate` reads, in order.

    Returns:
      uint8, shaped as `images`; undefined where the source coordinates are outside the image.
    """
    _, height, width, channels = images.shape
    row = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5
    top, _ = _split_coordinate(source(row)[1])
    second = jnp.pad(top[:, 1:] == top[:, :-1], ((0, 0), (1, 0), (0, 0)))
    source_rows = jnp.arange(-1, height)[None, :, None, None]  # half a pixel beyond each edge
    source_columns = jnp.arange(-1, width)[None, None, :, None]
    # The first output row that takes from a source row: (images, height + 1, width).
    first = (top[:, None] < source_rows).sum(axis=2)

    ends = (1 - taps[0], taps[-1])
    padded = jnp.pad(images, ((0, 0), ends, ends, (0, 0)), mode="edge")
    neighbors = jnp.stack(
        [
            padded[:, down : down + height + 1, across : across + width + 1, channel]
            for down in range(len(taps))
            for across in range(len(taps))
            for channel in range(channels)
        ],
        axis=2,
    ).astype(jnp.bfloat16)

    def values_of(row: jax.Array) -> jax.Array:
        across, down = source(row)
        left, right = _split_coordinate(across)
        _, below = _split_coordinate(down)
        chosen = (left[:, :, None] == source_columns).astype(jnp.bfloat16)
        found = jnp.einsum("nypx,nyxw->nypw", neighbors, chosen, preferred_element_type=jnp.float32)

        def read(rows: int, columns: int) -> jax.Array:
            at = taps.index(rows) * len(taps) + taps.index(columns)
            return found[:, :, channels * at : channels * (at + 1)]

        values = interpolate(read, right[:, :, None], below[:, :, None])
        return _to_uint8(values).astype(jnp.bfloat16)

    rows = [(first + later).astype(jnp.float32) + 0.5 for later in range(2)]
    values = jnp.concatenate([values_of(row) for row in rows], axis=2)
    taken = (top[:, None] == source_rows).astype(jnp.bfloat16)
    found = jnp.einsum("nyqw,nyrw->nrqw", values, taken, preferred_element_type=jnp.float32)
    found = jnp.where(second[:, :, None], found[:, :, channels:], found[:, :, :channels])
    return found.astype(jnp.uint8).swapaxes(2, 3)


def _split_coordinate(coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the pixel before a coordinate, int32, and the weight of the pixel after it."""
    before = jnp.floor(coordinate - 0.5)
    return before.astype(jnp.int32), coordinate - 0.5 - before


def _to_uint8(values: jax.Array) -> jax.Array:
    """Clips and truncates, as Pillow does."""
    return jnp.clip(values, 0, 255).astype(jnp.uint8)


def source_coordinates(
    sampled: SampledOps, row: jax.Array, column: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Source columns and rows of output pixels, float32 (images, rows, columns).

    The edges of the image are at 0 and at its size, so the center of a pixel is at a half. The
    displacement is computed separately and added last, to lose no float32 precision.

    Args:
      sampled: the operation of each image.
      row: output rows, float32, of a shape that broadcasts.
      column: output columns, float32, of a shape that broadcasts.
      height: of the images.
      width: of the images.
    """
    amount = sampled.argument

    def only(op: Op, value: jax.Array) -> jax.Array:
        return jnp.where(sampled.op == op, value, 0.0)[:, None, None]

    angle = jnp.deg2rad(amount)
    cos_minus_one = only(Op.ROTATE, jnp.cos(angle) - 1)
    sin = only(Op.ROTATE, jnp.sin(angle))
    from_center_x, from_center_y = column - width / 2, row - height / 2
    across = cos_minus_one * from_center_x - sin * from_center_y
    across += only(Op.SHEAR_X, amount) * row + only(Op.TRANSLATE_X, amount * width)
    down = sin * from_center_x + cos_minus_one * from_center_y
    down += only(Op.SHEAR_Y, amount) * column + only(Op.TRANSLATE_Y, amount * height)
    return column + across, row + down


# Both in Pillow's order of operations, which returns equal neighbors exactly.
def _linear(first: jax.Array, second: jax.Array, weight: jax.Array) -> jax.Array:
    return first + (second - first) * weight


def _cubic(
    before: jax.Array, first: jax.Array, second: jax.Array, after: jax.Array, weight: jax.Array
) -> jax.Array:
    square = 2 * (before - first) + second - after
    cube = -before + first - second + after
    return first + weight * (-before + second + weight * (square + weight * cube))
