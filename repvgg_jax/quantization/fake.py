"""Fake quantization for training: floats rounded to integers and a scale, with a gradient."""

import jax
import jax.numpy as jnp

from repvgg_jax.quantization.settings import Target


def fake_quantize(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array | int = 0, bits: int = 8
) -> jax.Array:
    """The floats that `scale * (q - zero_point)` gives for the nearest signed integers q.

    Its gradient is that of the identity where x is in range and 0 elsewhere (straight-through,
    Bengio et al., 2013); scale and zero point have none.

    Args:
      x: floats of any shape.
      scale: steps between two integers, above 0, broadcast against x.
      zero_point: the integer that means 0, in range.
      bits: of the integers, which are -2^(bits-1) … 2^(bits-1) - 1.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = jax.lax.stop_gradient(jnp.asarray(scale, x.dtype))
    zero_point = jax.lax.stop_gradient(jnp.asarray(zero_point, x.dtype))
    clipped = jnp.clip(x, (low - zero_point) * scale, (high - zero_point) * scale)
    integers = jnp.clip(jnp.round(x / scale) + zero_point, low, high)
    return clipped + jax.lax.stop_gradient((integers - zero_point) * scale - clipped)


def weight_scale(kernel: jax.Array) -> jax.Array:
    """Steps per output channel (1, …, channels) of a kernel: the largest magnitude is 127."""
    largest = jnp.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    return jnp.maximum(largest / 127, _TINY)


def range_scale(low: jax.Array, high: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Step and zero point of activations between two values, as `Grid.of_range` has them.

    The zero point is that of signed integers.
    """
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if target.symmetric:
        scale = jnp.maximum(jnp.maximum(-low, high) / target.highest, _TINY)
        return scale, jnp.zeros_like(scale)
    scale = jnp.maximum((high - low) / 255, _TINY)
    return scale, jnp.clip(jnp.round(-low / scale), 0, 255) - 128


_TINY = 1e-30
