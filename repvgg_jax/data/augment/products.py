"""Reading single values as matrix products, for TPUs, which have no other fast way to do it.

A TPU reads an array by tiles of a thousand values, and one value by one such tile. Multiplying by
a one-hot matrix instead is arithmetic that its matrix units do well, and exact: every sum has one
term, and bfloat16 holds the integers 0 … 255. Of the same coordinates,
the results are those of the reads, bit for bit.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Read = Callable[[int, int], jax.Array]
"""A pixel's source some rows below and columns to the right, float32."""


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Every pixel's entry, by the upper and the lower half of its bits.

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


def sample(
    images: jax.Array,
    source: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    interpolate: Callable[[Read, jax.Array, jax.Array], jax.Array],
    taps: Sequence[int],
) -> jax.Array:
    """Images read at other places, as two products along one axis each.

    For every column of the result and every row of the source, the first product finds what
    that source row gives to that column; the second brings it to the row of the result that
    takes it. At most two rows of the result may take from one source row in a column, as in
    rotations up to 60 degrees: both are computed.

    Args:
      images: uint8 (images, height, width, channels).
      source: from rows of the result, float32 (images or 1, some, width or 1), to the columns
        and rows that they come from, float32 (images, some, width): see
        `geometry.source_coordinates`. The rows ascend, by steps of 0, 1 or 2.
      interpolate: from source pixels and the shares of the right and the lower one, float32
        (images, some, 1, width), to values (images, some, channels, width).
      taps: rows and columns that `interpolate` reads, in order.

    Returns:
      uint8, shaped as `images`; undefined where the source lies outside of the image.
    """
    _, height, width, channels = images.shape
    row = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5
    top, _ = place(source(row)[1])
    second = jnp.pad(top[:, 1:] == top[:, :-1], ((0, 0), (1, 0), (0, 0)))
    source_rows = jnp.arange(-1, height)[None, :, None, None]  # half a pixel beyond each edge
    source_columns = jnp.arange(-1, width)[None, None, :, None]
    # The first row of the result that takes from a source row, (images, height + 1, width).
    first = (top[:, None] < source_rows).sum(axis=2)

    ends = (1 - taps[0], taps[-1])
    padded = jnp.pad(images, ((0, 0), ends, ends, (0, 0)), mode="edge")
    neighbours = jnp.stack(
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
        left, right = place(across)
        _, below = place(down)
        chosen = (left[:, :, None] == source_columns).astype(jnp.bfloat16)
        found = jnp.einsum(
            "nypx,nyxw->nypw", neighbours, chosen, preferred_element_type=jnp.float32
        )

        def read(rows: int, columns: int) -> jax.Array:
            at = taps.index(rows) * len(taps) + taps.index(columns)
            return found[:, :, channels * at : channels * (at + 1)]

        values = interpolate(read, right[:, :, None], below[:, :, None])
        return to_uint8(values).astype(jnp.bfloat16)

    rows = [(first + turn).astype(jnp.float32) + 0.5 for turn in range(2)]
    values = jnp.concatenate([values_of(row) for row in rows], axis=2)
    taken = (top[:, None] == source_rows).astype(jnp.bfloat16)
    found = jnp.einsum("nyqw,nyrw->nrqw", values, taken, preferred_element_type=jnp.float32)
    found = jnp.where(second[:, :, None], found[:, :, channels:], found[:, :, :channels])
    return found.astype(jnp.uint8).swapaxes(2, 3)


def place(coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pixel before a coordinate, int32, and the share of the one after it."""
    before = jnp.floor(coordinate - 0.5)
    return before.astype(jnp.int32), coordinate - 0.5 - before


def to_uint8(values: jax.Array) -> jax.Array:
    """By cutting off, as Pillow."""
    return jnp.clip(values, 0, 255).astype(jnp.uint8)
