"""Bilinear resizing and adaptive average pooling of feature maps, with PyTorch's arithmetic.

`jax.image.resize` puts samples at the centers of pixels, so it cannot give what segmentation
networks need: corners on corners (`align_corners=True`), or a map whose pixel i lies at pixel
8 i of the image. Both functions are linear along each axis with weights that are known when the
program is compiled, so both are two small matrix products.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Size = Sequence[int]


def resize_bilinear(x: jax.Array, size: Size, *, align_corners: bool) -> jax.Array:
    """`torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=…)`.

    Weights are rounded as PyTorch rounds them, so that float32 results agree to 1e-6. Nothing is
    smoothed when the size decreases, as in PyTorch.

    Args:
      x: (images, height, width, channels).
      size: height and width of the result.
      align_corners: put corner pixels on corner pixels; otherwise edges on edges.

    Returns:
      (images, *size, channels) in the dtype of `x`.

    Raises:
      ValueError: a size without pixels.
    """

    def positions(before: Any, after: Any, dtype: Any, xp: Any) -> Any:
        index = xp.arange(after)
        if align_corners:
            # A single pixel, whose index is 0, is at the first one.
            return index * _rounded((before - 1) / xp.maximum(after - 1, 1), dtype)
        return xp.maximum(_rounded(before / after, dtype) * (index + 0.5) - 0.5, 0)

    return _interpolate(x, size, positions)


def upsample(x: jax.Array, stride: int, size: Size) -> jax.Array:
    """Feature maps to the resolution of the images that they come from.

    Convolutions of stride 2 with padding 1, as in RepVGG and ResNet, put pixel i of a map of that
    stride at pixel `stride * i` of the image, and this puts it back there; beyond the last one it
    is repeated. For images of `stride * k + 1` pixels this is `align_corners=True`, which is what
    PSPNet asks its images to be; other sizes stay aligned, too.

    Args:
      x: (images, ceil(height / stride), ceil(width / stride), channels).
      stride: pixels of the images per pixel of the feature maps.
      size: height and width of the images.

    Returns:
      (images, height, width, channels) in the dtype of `x`.
    """
    return _interpolate(x, size, lambda before, after, dtype, xp: xp.arange(after) / stride)


def adaptive_average_pool(x: jax.Array, size: Size) -> jax.Array:
    """`torch.nn.functional.adaptive_avg_pool2d`: means over windows that cover the map.

    Window i of n along an axis of length m is [floor(i m / n), ceil((i + 1) m / n)); windows
    overlap where n does not divide m.

    Args:
      x: (images, height, width, channels).
      size: number of windows along height and width.

    Returns:
      (images, *size, channels) in the dtype of `x`.
    """

    def weights(before: Any, after: Any, xp: Any) -> Any:
        index = xp.arange(after)
        first, end = index * before // after, -(-(index + 1) * before // after)
        pixel = xp.arange(before)[None]
        inside = (pixel >= first[:, None]) & (pixel < end[:, None])
        return inside / (end - first)[:, None]

    return _apply(x, size, weights)


def _interpolate(x: jax.Array, size: Size, positions: Callable[..., Any]) -> jax.Array:
    """Interpolates between neighbors at the positions that each output pixel comes from.

    PyTorch rounds the ratio of the two sizes, and then the position once, as a fused
    multiply-add.
    """
    dtype = np.float64 if x.dtype == jnp.float64 else np.float32

    def weights(before: Any, after: Any, xp: Any) -> Any:
        position = xp.minimum(positions(before, after, dtype, xp), before - 1).astype(dtype)
        low = xp.floor(position)
        high = xp.minimum(low + 1, before - 1)
        share = (position - low)[:, None]
        pixel = xp.arange(before)[None]
        at_low, at_high = (pixel == place[:, None] for place in (low, high))
        return at_low * (1 - share) + at_high * share

    return _apply(x, size, weights)


def _rounded(value: Any, dtype: Any) -> Any:
    """A number in `dtype`; a Python float of that value if it is known."""
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    return float(dtype(value))


def _apply(x: jax.Array, size: Size, weights: Callable[..., Any]) -> jax.Array:
    """Multiplies both spatial axes by matrices (after, before), in at least float32.

    The matrices are constants of the program, computed by NumPy; if sizes are symbolic, as in an
    export for all sizes, the program computes them.
    """
    known = all(isinstance(side, int) for side in (*x.shape[1:3], *size))
    if known and min(size) < 1:
        raise ValueError(f"feature maps cannot have {size[0]}x{size[1]} pixels; give 1 or more")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = (
        jnp.asarray(weights(before, after, np if known else jnp), dtype)
        for before, after in zip(x.shape[1:3], size, strict=True)
    )
    # Full precision: accelerators would round interpolated logits to bfloat16 otherwise.
    y = jnp.einsum("oh,nhwc->nowc", rows, x.astype(dtype), precision="highest")
    y = jnp.einsum("ow,nhwc->nhoc", columns, y, precision="highest")
    return y.astype(x.dtype)
