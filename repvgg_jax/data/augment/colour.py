"""Operations that mix the channels or the neighbours of a pixel: saturation, sharpness, hue."""

from collections.abc import Set

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.kinds import Kind
from repvgg_jax.data.augment.tables import blend, luma

BLEND_KINDS = frozenset({Kind.COLOR, Kind.SHARPNESS})


def blended(
    images: jax.Array, kind: jax.Array, argument: jax.Array, possible: Set[Kind]
) -> jax.Array:
    """`ImageEnhance.Color` and `ImageEnhance.Sharpness`; other kinds leave an image as it is.

    Args:
      images: uint8 (images, height, width, channels).
      kind: int32 (images,), values of `Kind`.
      argument: float32 (images,), the factor.
      possible: kinds that can occur.
    """
    of = kind[:, None, None, None]
    degenerate = images.astype(jnp.int32)
    if Kind.COLOR in possible:
        degenerate = jnp.where(of == Kind.COLOR, luma(images), degenerate)
    if Kind.SHARPNESS in possible:
        degenerate = jnp.where(of == Kind.SHARPNESS, smooth(images), degenerate)
    return blend(degenerate, images, argument[:, None, None, None])


def smooth(images: jax.Array) -> jax.Array:
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


def turn_hue(images: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns the hue of uint8 images (images, height, width, 3), through Pillow's HSV of 8 bits.

    Args:
      images: uint8.
      turn: float32 (images,), share of the colour circle; 0 leaves an image as it is.
    """
    hue, saturation, value = _to_hsv(images)
    steps = (turn * 255).astype(jnp.int32)[:, None, None]
    turned = _from_hsv((hue + steps) & 255, saturation, value)
    return jnp.where((turn != 0)[:, None, None, None], turned, images)


def _to_hsv(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hue, saturation and value, int32 0 … 255: Pillow's `convert("HSV")`."""
    red, green, blue = (images[..., channel].astype(jnp.int32) for channel in range(3))
    most = jnp.maximum(red, jnp.maximum(green, blue))
    spread = most - jnp.minimum(red, jnp.minimum(green, blue))
    divisor = jnp.maximum(spread, 1).astype(jnp.float32)
    to_red, to_green, to_blue = (
        (most - channel).astype(jnp.float32) / divisor for channel in (red, green, blue)
    )

    def sector_of(base: int, up: jax.Array, down: jax.Array) -> jax.Array:
        """`base + up - down`, of which one is 1, rounded once: Pillow adds in double precision."""
        return jnp.where(up == 1, (base + 1) - down, (base - 1) + up)

    sector = jnp.where(
        red == most,
        sector_of(0, to_blue, to_green),
        jnp.where(green == most, sector_of(2, to_red, to_blue), sector_of(4, to_green, to_red)),
    )
    turn = sector / 6
    # XLA multiplies by a rounded 1/6; the remainder, exact in float32, puts that right.
    turn += (sector - 4 * turn - 2 * turn) / 6
    hue = _times_255(jnp.where(turn < 0, 1 + turn, turn))
    saturation = _times_255(spread.astype(jnp.float32) / jnp.maximum(most, 1).astype(jnp.float32))
    return jnp.where(spread > 0, hue, 0), jnp.where(spread > 0, saturation, 0), most


def _times_255(share: jax.Array) -> jax.Array:
    """255 times a float32 in [0, 1], cut off to an integer as if the product were exact.

    Pillow multiplies in double precision, and whole products are common. The two differences
    are exact in float32.
    """
    nearest = jnp.round(share * 255)
    excess = (share * 256 - nearest) - share
    return jnp.where(excess < 0, nearest - 1, nearest).astype(jnp.int32)


def _from_hsv(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    """uint8 (…, 3): Pillow's conversion back."""
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
    turned = [jnp.select([sector % 6 == k for k in range(6)], list(way)) for way in channels]
    grey = (saturation == 0)[..., None]
    return jnp.where(grey, value[..., None], jnp.stack(turned, -1)).astype(jnp.uint8)
