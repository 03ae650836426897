"""Table lookup and resampling as matrix products, for TPUs, which have no fast gather.

A TPU reads an array by tiles of a thousand values, and a single value by a whole tile. A product
with a one-hot matrix runs on its matrix units instead, and is exact: every sum has one term, and
bfloat16 represents the integers 0 … 255. For equal coordinates the results are bitwise those of
the gathers in `ops.py` and `warp.py`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

ReadPixel = Callable[[int, int], jax.Array]
"""(row offset, column offset) -> source pixels at that offset, float32."""


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Maps every pixel through its table, by the upper and the lower half of its bits.

    Args:
      images: uint8 (images, height, width, channels).
      tables: uint8 (images, channels, 256).

    Returns:
      uint8, shaped as `images`.
    """
    count, _, _, channels = images.shape
    pixels = images.transpose(0, 3, 1, 2)[:, :, None]
    halves = jnp.arange(16, dtype=jnp.uint8)[None, None, :, None, None]
    lower = (pixels & 15 == halves).astype(jnp.bfloat16)
    rows = jnp.einsum(
        "ncul,nclhw->ncuhw",
        tables.reshape(count, channels, 16, 16).astype(jnp.bfloat16),
        lower,
        preferred_element_type=jnp.float32,
    )
    found = jnp.where(pixels >> 4 == halves, rows, 0).sum(axis=2)
    return found.astype(jnp.uint8).transpose(0, 2, 3, 1)


def resample(
    images: jax.Array,
    source: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    interpolate: Callable[[ReadPixel, jax.Array, jax.Array], jax.Array],
    taps: Sequence[int],
) -> jax.Array:
    """Samples images at other coordinates, as one matrix product along each axis.

    For every output column and every source row, the first product computes what that source row
    contributes to that column; the second moves it to the output row that takes it. At most two
    output rows may take from one source row in a column, which holds for rotations up to
    60 degrees: both are computed.

    Args:
      images: uint8 (images, height, width, channels).
      source: from output rows, float32 (images or 1, some, width or 1), to the source columns and
        rows, float32 (images, some, width): see `warp.source_coordinates`. Source rows ascend in
        steps of 0, 1 or 2.
      interpolate: from source pixels and the weights of the right and the lower one, float32
        (images, some, 1, width), to values (images, some, channels, width).
      taps: row and column offsets that `interpolate` reads, in order.

    Returns:
      uint8, shaped as `images`; undefined where the source coordinates are outside the image.
    """
    _, height, width, channels = images.shape
    row = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5
    top, _ = split_coordinate(source(row)[1])
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
        left, right = split_coordinate(across)
        _, below = split_coordinate(down)
        chosen = (left[:, :, None] == source_columns).astype(jnp.bfloat16)
        found = jnp.einsum("nypx,nyxw->nypw", neighbors, chosen, preferred_element_type=jnp.float32)

        def read(rows: int, columns: int) -> jax.Array:
            at = taps.index(rows) * len(taps) + taps.index(columns)
            return found[:, :, channels * at : channels * (at + 1)]

        values = interpolate(read, right[:, :, None], below[:, :, None])
        return to_uint8(values).astype(jnp.bfloat16)

    rows = [(first + later).astype(jnp.float32) + 0.5 for later in range(2)]
    values = jnp.concatenate([values_of(row) for row in rows], axis=2)
    taken = (top[:, None] == source_rows).astype(jnp.bfloat16)
    found = jnp.einsum("nyqw,nyrw->nrqw", values, taken, preferred_element_type=jnp.float32)
    found = jnp.where(second[:, :, None], found[:, :, channels:], found[:, :, :channels])
    return found.astype(jnp.uint8).swapaxes(2, 3)


def split_coordinate(coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the pixel before a coordinate, int32, and the weight of the pixel after it."""
    before = jnp.floor(coordinate - 0.5)
    return before.astype(jnp.int32), coordinate - 0.5 - before


def to_uint8(values: jax.Array) -> jax.Array:
    """Clips and truncates, as Pillow does."""
    return jnp.clip(values, 0, 255).astype(jnp.uint8)
