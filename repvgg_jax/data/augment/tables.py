"""Operations that look every pixel up in a table: 256 entries for each channel of each image."""

from collections.abc import Set

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment import products
from repvgg_jax.data.augment.kinds import Kind

TABLE_KINDS = frozenset(
    {
        Kind.INVERT,
        Kind.POSTERIZE,
        Kind.SOLARIZE,
        Kind.SOLARIZE_ADD,
        Kind.AUTO_CONTRAST,
        Kind.EQUALIZE,
        Kind.BRIGHTNESS,
        Kind.CONTRAST,
    }
)


def luma(images: jax.Array) -> jax.Array:
    """Grey values int32 (…, 1) of uint8 images (…, channels): Pillow's `convert("L")`.

    ITU-R 601-2 in 16 bits of fixed point; an image of one channel is its own.
    """
    values = images.astype(jnp.int32)
    if images.shape[-1] == 1:
        return values
    red, green, blue = jnp.split(values, 3, axis=-1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def blend(degenerate: jax.Array, values: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's `Image.blend`: factor 0 gives `degenerate`, 1 `values`, above 1 goes on.

    Args:
      degenerate: integers, 0 … 255.
      values: integers of a shape that fits, 0 … 255.
      factor: float32 of a shape that fits.

    Returns:
      uint8.
    """
    start = degenerate.astype(jnp.float32)
    mixed = start + factor * (values.astype(jnp.float32) - start)
    return jnp.clip(mixed, 0, 255).astype(jnp.uint8)  # to an integer by cutting off, as Pillow


def make_tables(
    images: jax.Array, kind: jax.Array, argument: jax.Array, possible: Set[Kind]
) -> jax.Array:
    """Tables uint8 (images, channels, 256); the identity for kinds that are none of these.

    Args:
      images: uint8 (images, height, width, channels).
      kind: int32 (images,), values of `Kind`.
      argument: float32 (images,): bits, threshold, addend or factor.
      possible: kinds that can occur; what others would need is not computed.
    """
    shape = (images.shape[0], images.shape[-1], 256)
    entries = jnp.arange(256)[None, None, :]
    amount = argument[:, None, None]
    whole = amount.astype(jnp.int32)
    makers = {
        Kind.INVERT: lambda: 255 - entries,
        Kind.POSTERIZE: lambda: entries & ~((1 << (8 - whole)) - 1),
        Kind.SOLARIZE: lambda: jnp.where(entries < whole, entries, 255 - entries),
        Kind.SOLARIZE_ADD: lambda: jnp.where(
            entries < 128, jnp.minimum(entries + whole, 255), entries
        ),
        Kind.AUTO_CONTRAST: lambda: _stretched(images, entries),
        Kind.EQUALIZE: lambda: _equalized(images, entries),
        Kind.BRIGHTNESS: lambda: blend(jnp.zeros_like(entries), entries, amount),
        Kind.CONTRAST: lambda: blend(_mean_grey(images), entries, amount),
    }
    tables = jnp.broadcast_to(entries, shape).astype(jnp.uint8)
    for which, make in makers.items():
        if which in possible:
            chosen = (kind == which)[:, None, None]
            tables = jnp.where(chosen, make().astype(jnp.uint8), tables)
    return tables


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Every pixel's entry: uint8, shaped as `images` (images, height, width, channels)."""
    return jax.lax.platform_dependent(images, tables, tpu=products.look_up, default=_read_tables)


def _read_tables(images: jax.Array, tables: jax.Array) -> jax.Array:
    count, _, _, channels = images.shape
    pixels = images.reshape(count, -1, channels).astype(jnp.int32)
    found = jnp.take_along_axis(tables.swapaxes(1, 2), pixels, axis=1, mode="promise_in_bounds")
    return found.reshape(images.shape)


def histogram(images: jax.Array) -> jax.Array:
    """How often every value occurs: int32 (images, channels, 256).

    A product of two one-hot matrices, of the upper and of the lower four bits: no scatter, and
    exact, because a float32 counts up to 2**24.
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


def _stretched(images: jax.Array, entries: jax.Array) -> jax.Array:
    """`ImageOps.autocontrast`: the darkest value to 0, the brightest to 255."""
    low = images.min((1, 2)).astype(jnp.int32)[..., None]
    high = images.max((1, 2)).astype(jnp.int32)[..., None]
    stretched = 255 * (entries - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), entries)


def _equalized(images: jax.Array, entries: jax.Array) -> jax.Array:
    """`ImageOps.equalize`: every value as often as the others, as far as that goes."""
    counts = histogram(images)
    total = images.shape[1] * images.shape[2]
    brightest = images.max((1, 2)).astype(jnp.int32)[..., None]
    last = jnp.take_along_axis(counts, brightest, axis=-1, mode="promise_in_bounds")
    step = (total - last) // 255
    before = counts.cumsum(-1) - counts
    equalized = (step // 2 + before) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(equalized, 255), entries)


def _mean_grey(images: jax.Array) -> jax.Array:
    """The grey that `ImageEnhance.Contrast` moves away from: int32 (images, 1, 1)."""
    greys = luma(images)
    pixels = greys.shape[1] * greys.shape[2]
    total = greys.sum((1, 2))[..., None]
    # Integers: a float32 mean would round wrongly near a half. 2 ** 31 is beyond 2000x2000.
    return (2 * total + pixels) // (2 * pixels)
