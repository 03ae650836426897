"""Changing the size of images: exactly as Pillow does, and several times faster.

Pillow's bilinear filter widens with the scale, so that nothing aliases when images shrink.
OpenCV's does not widen, but is several times faster. `resize_quickly` has both: before it
shrinks an image by s it blurs it with [k, 1 - 2k, k], k = (s² - 1)/12, which gives the two
steps together the variance of the widened filter, s²/6; at s = 2 they are the same filter.
"""

import math

import cv2
import numpy as np
from PIL import Image

# A worker is a process; threads of its own would only stand in the way of the others.
cv2.setNumThreads(1)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bilinear filter, antialiased.

    Args:
      pixels: uint8 (…, …, channels), 1 or 3 channels.
      height: of the result, in pixels.
      width: likewise.

    Returns:
      uint8 (height, width, channels).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    grey = pixels.shape[-1] == 1
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if grey else resized


def resize_quickly(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearly what `resize` gives, where nothing shrinks to less than half; else exactly.

    On photographs it differs from `resize` by at most one grey level where the image grows,
    and by less than two on average where it shrinks (tests/test_data_views.py).

    Args and result as for `resize`.
    """
    scales = pixels.shape[0] / height, pixels.shape[1] / width
    if max(scales) > 2:
        return resize(pixels, height, width)
    if max(scales) > 1:
        (rows, down), (columns, across) = map(_blur, scales)
        pixels = cv2.GaussianBlur(
            pixels, (columns, rows), across, sigmaY=down, borderType=cv2.BORDER_REPLICATE
        )
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized.reshape(height, width, -1)


def _blur(scale: float) -> tuple[int, float]:
    """Taps and standard deviation of the Gaussian that is [k, 1 - 2k, k], as OpenCV wants it."""
    if scale <= 1:
        return 1, 1.0  # one tap is [1], whatever the deviation
    k = (scale**2 - 1) / 12
    return 3, math.sqrt(0.5 / math.log((1 - 2 * k) / k))
