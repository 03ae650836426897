"""Applies one operation to every image of a batch, each image its own, in one program.

A `vmap` of a `switch` would compute every operation for every image. Here an image passes through
one lookup table, one blend, one warp and one cutout, and all but its own operation are the
identity for it.
"""

from collections.abc import Set

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.base import Op, SampledOps
from repvgg_jax.data.augment.warp import GEOMETRIC_OPS, warp

TABLE_OPS = frozenset(
    {
        Op.INVERT,
        Op.POSTERIZE,
        Op.SOLARIZE,
        Op.SOLARIZE_ADD,
        Op.AUTO_CONTRAST,
        Op.EQUALIZE,
        Op.BRIGHTNESS,
        Op.CONTRAST,
    }
)
BLEND_OPS = frozenset({Op.COLOR, Op.SHARPNESS})
RGB_OPS = frozenset({Op.COLOR, Op.HUE})
"""Operations that need three channels."""

CUTOUT_FILL = (125, 122, 113)
"""The color of cutouts in RepVGG's training code; one channel takes the first value."""


def apply_op(
    images: jax.Array,
    sampled: SampledOps,
    *,
    possible: Set[Op],
    fill: tuple[int, ...] = (128, 128, 128),
    resampling: str = "bilinear",
) -> jax.Array:
    """Applies to each image the operation that was sampled for it.

    Args:
      images: uint8 (images, height, width, channels).
      sampled: one operation per image.
      possible: operations that can occur; the program computes what these need and no more.
      fill: see `warp`.
      resampling: see `warp`.

    Returns:
      uint8, shaped as `images`.
    """
    op, argument = sampled.op, sampled.argument
    if possible & TABLE_OPS:
        images = look_up(images, make_tables(images, op, argument, possible))
    if possible & BLEND_OPS:
        images = _blend_ops(images, op, argument, possible)
    if Op.HUE in possible:
        images = shift_hue(images, jnp.where(op == Op.HUE, argument, 0.0))
    if possible & GEOMETRIC_OPS:
        images = warp(images, sampled, fill, resampling)
    if Op.CUTOUT in possible:
        images = _cutout(images, sampled)
    return images


def apply_in_turn(
    images: jax.Array,
    sampled: SampledOps,
    *,
    possible: Set[Op],
    fill: tuple[int, ...] = (128, 128, 128),
    resampling: str = "bilinear",
) -> jax.Array:
    """Applies several operations per image one after the other, in a loop compiled once.

    Args:
      images: uint8 (images, height, width, channels).
      sampled: fields of shape (images, operations).
      possible: see `apply_op`; the union over all turns.
      fill: see `warp`.
      resampling: see `warp`.
    """

    def step(images: jax.Array, sampled: SampledOps) -> tuple[jax.Array, None]:
        changed = apply_op(images, sampled, possible=possible, fill=fill, resampling=resampling)
        return changed, None

    turns = SampledOps(*(field.swapaxes(0, 1) for field in sampled))
    return jax.lax.scan(step, images, turns)[0]


# Lookup tables: 256 entries per image and channel.


def make_tables(
    images: jax.Array, op: jax.Array, argument: jax.Array, possible: Set[Op]
) -> jax.Array:
    """Tables uint8 (images, channels, 256); the identity for operations without a table.

    Args:
      images: uint8 (images, height, width, channels).
      op: int32 (images,), values of `Op`.
      argument: float32 (images,): bits, threshold, addend or factor.
      possible: operations that can occur; the others' tables are not computed.
    """
    shape = (images.shape[0], images.shape[-1], 256)
    entries = jnp.arange(256)[None, None, :]
    amount = argument[:, None, None]
    whole = amount.astype(jnp.int32)
    makers = {
        Op.INVERT: lambda: 255 - entries,
        Op.POSTERIZE: lambda: entries & ~((1 << (8 - whole)) - 1),
        Op.SOLARIZE: lambda: jnp.where(entries < whole, entries, 255 - entries),
        Op.SOLARIZE_ADD: lambda: jnp.where(
            entries < 128, jnp.minimum(entries + whole, 255), entries
        ),
        Op.AUTO_CONTRAST: lambda: _autocontrast(images, entries),
        Op.EQUALIZE: lambda: _equalize(images, entries),
        Op.BRIGHTNESS: lambda: _blend(jnp.zeros_like(entries), entries, amount),
        Op.CONTRAST: lambda: _blend(_mean_gray(images), entries, amount),
    }
    tables = jnp.broadcast_to(entries, shape).astype(jnp.uint8)
    for table_op, make in makers.items():
        if table_op in possible:
            chosen = (op == table_op)[:, None, None]
            tables = jnp.where(chosen, make().astype(jnp.uint8), tables)
    return tables


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Maps every pixel through its table: uint8, shaped as `images`."""
    return jax.lax.platform_dependent(images, tables, tpu=matmul_tables, default=_gather_tables)


def matmul_tables(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Maps every pixel through its table, as matrix products, which TPUs compute faster.

    The one-hot matrices are of the lower half of a pixel's bits; the upper half selects from the
    results. Exact, as in `warp.py`: bitwise the result of a gather.

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


def _gather_tables(images: jax.Array, tables: jax.Array) -> jax.Array:
    count, _, _, channels = images.shape
    pixels = images.reshape(count, -1, channels).astype(jnp.int32)
    found = jnp.take_along_axis(tables.swapaxes(1, 2), pixels, axis=1, mode="promise_in_bounds")
    return found.reshape(images.shape)


def _histogram(images: jax.Array) -> jax.Array:
    """Counts of every value: int32 (images, channels, 256).

    A product of two one-hot matrices, of the upper and of the lower four bits: no scatter, and
    exact, since a float32 counts up to 2**24.
    """
    count, _, _, channels = images.shape
    pixels = images.reshape(count, -1, channels)
    upper, lower = (
        (half[..., None] == jnp.arange(16, dtype=jnp.uint8)[None, None, None, :]).astype(
            jnp.bfloat16
        )
        for half in (pixels >> 4, pixels & 15)
    )
    counts = jnp.einsum("npcu,npcl->ncul", upper, lower, preferred_element_type=jnp.float32)
    return counts.reshape(count, channels, 256).astype(jnp.int32)


def _autocontrast(images: jax.Array, entries: jax.Array) -> jax.Array:
    """`ImageOps.autocontrast`: the darkest value to 0, the brightest to 255."""
    low = images.min((1, 2)).astype(jnp.int32)[..., None]
    high = images.max((1, 2)).astype(jnp.int32)[..., None]
    stretched = 255 * (entries - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), entries)


def _equalize(images: jax.Array, entries: jax.Array) -> jax.Array:
    """`ImageOps.equalize`: a histogram as flat as a table can make it."""
    counts = _histogram(images)
    total = images.shape[1] * images.shape[2]
    brightest = images.max((1, 2)).astype(jnp.int32)[..., None]
    last = jnp.take_along_axis(counts, brightest, axis=-1, mode="promise_in_bounds")
    step = (total - last) // 255
    before = counts.cumsum(-1) - counts
    equalized = (step // 2 + before) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(equalized, 255), entries)


def _mean_gray(images: jax.Array) -> jax.Array:
    """The gray that `ImageEnhance.Contrast` moves away from: int32 (images, 1, 1)."""
    gray = _luma(images)
    pixels = gray.shape[1] * gray.shape[2]
    total = gray.sum((1, 2))[..., None]
    # Integers: a float32 mean would round wrongly near a half. 2 ** 31 is beyond 2000x2000.
    return (2 * total + pixels) // (2 * pixels)


def _luma(images: jax.Array) -> jax.Array:
    """Gray values int32 (…, 1) of uint8 images (…, channels): Pillow's `convert("L")`.

    ITU-R 601-2 in 16 bits of fixed point; an image of one channel stays as it is.
    """
    values = images.astype(jnp.int32)
    if images.shape[-1] == 1:
        return values
    red, green, blue = jnp.split(values, 3, axis=-1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


# Blends of an image and a degenerate version of it.


def _blend(degenerate: jax.Array, values: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's `Image.blend`: 0 gives `degenerate`, 1 `values`, above 1 extrapolates.

    Args:
      degenerate: integers, 0 … 255.
      values: integers of a shape that broadcasts, 0 … 255.
      factor: float32 of a shape that broadcasts.

    Returns:
      uint8.
    """
    start = degenerate.astype(jnp.float32)
    mixed = start + factor * (values.astype(jnp.float32) - start)
    return jnp.clip(mixed, 0, 255).astype(jnp.uint8)  # truncates, as Pillow does


def _blend_ops(
    images: jax.Array, op: jax.Array, argument: jax.Array, possible: Set[Op]
) -> jax.Array:
    """`ImageEnhance.Color` and `ImageEnhance.Sharpness`; other images stay as they are.

    Args:
      images: uint8 (images, height, width, channels).
      op: int32 (images,), values of `Op`.
      argument: float32 (images,), the factor.
      possible: operations that can occur.
    """
    op = op[:, None, None, None]
    degenerate = images.astype(jnp.int32)
    if Op.COLOR in possible:
        degenerate = jnp.where(op == Op.COLOR, _luma(images), degenerate)
    if Op.SHARPNESS in possible:
        degenerate = jnp.where(op == Op.SHARPNESS, _smooth(images), degenerate)
    return _blend(degenerate, images, argument[:, None, None, None])


def _smooth(images: jax.Array) -> jax.Array:
    """`ImageFilter.SMOOTH`: int32, the outermost pixels unchanged.

    Weights 1 around 5, divided by 13 and rounded; a half cannot occur.
    """
    values = images.astype(jnp.int32)
    _, height, width, _ = values.shape
    padded = jnp.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    row, column = jnp.arange(height), jnp.arange(width)
    rows_inside = ((row > 0) & (row < height - 1))[:, None]
    columns_inside = ((column > 0) & (column < width - 1))[None, :]
    inside = (rows_inside & columns_inside)[None, :, :, None]
    rounded = (2 * (around + 4 * values) + 13) // 26
    return jnp.where(inside, rounded, values)


def _cutout(images: jax.Array, sampled: SampledOps) -> jax.Array:
    """Paints a square; the part of it outside the image is dropped.

    Args:
      images: uint8 (images, height, width, channels).
      sampled: `argument` is the side, `row` and `column` the center.
    """
    _, height, width, channels = images.shape
    half = (sampled.argument.astype(jnp.int32) // 2)[:, None]

    def covered(center: jax.Array, size: int) -> jax.Array:
        middle = jnp.floor(center * size).astype(jnp.int32)[:, None]
        index = jnp.arange(size)[None, :]
        return (index >= middle - half) & (index < middle + half)

    rows, columns = covered(sampled.row, height), covered(sampled.column, width)
    square = rows[:, :, None] & columns[:, None, :] & (sampled.op == Op.CUTOUT)[:, None, None]
    color = np.array(CUTOUT_FILL[:channels], np.uint8).reshape(1, 1, 1, -1)
    return jnp.where(square[..., None], color, images)


# Hue, through Pillow's HSV of 8 bits.


def shift_hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Shifts the hue of images (images, height, width, 3).

    Args:
      images: uint8.
      shift: float32 (images,), fraction of the color circle; 0 leaves an image as it is.
    """
    hue, saturation, value = _to_hsv(images)
    steps = (shift * 255).astype(jnp.int32)[:, None, None]
    shifted = _from_hsv((hue + steps) & 255, saturation, value)
    return jnp.where((shift != 0)[:, None, None, None], shifted, images)


def _to_hsv(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hue, saturation and value, int32 0 … 255: Pillow's `convert("HSV")`."""
    red, green, blue = (images[..., channel].astype(jnp.int32) for channel in range(3))
    value = jnp.maximum(red, jnp.maximum(green, blue))
    spread = value - jnp.minimum(red, jnp.minimum(green, blue))
    divisor = jnp.maximum(spread, 1).astype(jnp.float32)
    to_red, to_green, to_blue = (
        (value - channel).astype(jnp.float32) / divisor for channel in (red, green, blue)
    )

    def sector_of(base: int, up: jax.Array, down: jax.Array) -> jax.Array:
        """`base + up - down`, of which one is 1, rounded once: Pillow adds in double precision."""
        return jnp.where(up == 1, (base + 1) - down, (base - 1) + up)

    sector = jnp.where(
        red == value,
        sector_of(0, to_blue, to_green),
        jnp.where(green == value, sector_of(2, to_red, to_blue), sector_of(4, to_green, to_red)),
    )
    turn = sector / 6
    # XLA multiplies by a rounded 1/6; the remainder, exact in float32, corrects that.
    turn += (sector - 4 * turn - 2 * turn) / 6
    hue = _times_255(jnp.where(turn < 0, 1 + turn, turn))
    saturation = _times_255(spread.astype(jnp.float32) / jnp.maximum(value, 1).astype(jnp.float32))
    return jnp.where(spread > 0, hue, 0), jnp.where(spread > 0, saturation, 0), value


def _times_255(fraction: jax.Array) -> jax.Array:
    """255 times a float32 in [0, 1], truncated to an integer as if the product were exact.

    Pillow multiplies in double precision, and integer products are common. The two differences
    are exact in float32.
    """
    nearest = jnp.round(fraction * 255)
    excess = (fraction * 256 - nearest) - fraction
    return jnp.where(excess < 0, nearest - 1, nearest).astype(jnp.int32)


def _from_hsv(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    """uint8 (…, 3): Pillow's conversion back to RGB."""
    sector = hue * 6 // 255
    along = hue * 6 - 255 * sector

    def faded(share: jax.Array) -> jax.Array:
        """`value * (1 - saturation * share)`, `share` in 1/255, rounded; a half cannot occur."""
        unit = 255 * 255
        return (2 * value * (unit - saturation * share) + unit) // (2 * unit)

    low = faded(jnp.full_like(along, 255))
    falling = faded(along)
    rising = faded(255 - along)
    channels = (
        (value, falling, low, low, rising, value),
        (rising, value, value, falling, low, low),
        (low, low, rising, value, value, falling),
    )
    rgb = [jnp.select([sector % 6 == k for k in range(6)], list(way)) for way in channels]
    gray = (saturation == 0)[..., None]
    return jnp.where(gray, value[..., None], jnp.stack(rgb, -1)).astype(jnp.uint8)
