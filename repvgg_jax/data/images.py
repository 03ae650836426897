"""Images to the pixels that the network gets: crops and resizing.

Crops are random in training and from the center in evaluation; everything else happens on the
device. `decoding.py` reads the files.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image

from repvgg_jax.data.decoding import Decoder, decode, is_jpeg
from repvgg_jax.data.settings import Size, height_width

REDUCTIONS = (8, 4, 2)
"""Factors by which decoding can shrink a JPEG for less work, the largest first."""

CROP_ATTEMPTS = 10  # at a crop that fits into the image, as in torchvision

# A worker is a process; threads of OpenCV's own would only compete with the other workers.
cv2.setNumThreads(1)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random crop of an image, resized to a given size.

    Source: C. Szegedy et al., Going Deeper with Convolutions, section 6; the numbers and the
    fallback after ten attempts are torchvision's.

    Attributes:
      scale: smallest and largest fraction of the image's area.
      ratio: smallest and largest width/height, relative to that of the result; its logarithm is
        uniform.
      decoder: of encoded images.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    decoder: Decoder = decode

    def __call__(
        self, example: Mapping[str, Any], size: Size, rng: np.random.Generator
    ) -> np.ndarray:
        """The crop that `rng` samples.

        A crop of a JPEG that is at least 2, 4 or 8 times as large as `size` is decoded at that
        reduction, its edges rounded to multiples of it, and color is not interpolated before it
        is resized. On sharp photographs the result is within 4 gray levels on average of decoding
        all pixels and resizing with Pillow (tests/test_data_images.py).

        Args:
          example: with `image` or `encoded`.
          size: height and width of the result, in pixels; one number for a square.
          rng: source of the random numbers.

        Returns:
          uint8 (height, width, channels).

        Raises:
          UndecodableError: the image is damaged.
        """
        rows, columns = height_width(size)
        encoded = example.get("encoded", b"")
        if is_jpeg(encoded):
            full_height, full_width = self.decoder.size(encoded)
            top, left, height, width = self.sample(full_height, full_width, rng, columns / rows)
            reduction = next(
                (r for r in REDUCTIONS if height >= r * rows and width >= r * columns), 1
            )
            pixels = self.decoder(encoded, reduction, fast_upsample=True)
            if pixels.shape[:2] != (full_height, full_width):
                top, left, height, width = (
                    round(length / reduction) for length in (top, left, height, width)
                )
        else:
            pixels = example["image"] if "image" in example else self.decoder(encoded)
            top, left, height, width = self.sample(
                pixels.shape[0], pixels.shape[1], rng, columns / rows
            )
        return fast_resize(pixels[top : top + height, left : left + width], rows, columns)

    def sample(
        self, height: int, width: int, rng: np.random.Generator, aspect: float = 1.0
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop of an image, in pixels.

        Args:
          height: of the image.
          width: of the image.
          rng: source of the random numbers.
          aspect: width/height of the result.
        """
        ratios = [ratio * aspect for ratio in self.ratio]
        low, high = map(math.log, ratios)
        for _ in range(CROP_ATTEMPTS):
            share, shape, down, across = rng.random(4).tolist()
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + shape * (high - low))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(down * (height - crop_height + 1))
                left = int(across * (width - crop_width + 1))
                return top, left, crop_height, crop_width
        # No crop fits the aspect ratio: take the center at the nearest allowed ratio.
        crop_width = min(width, max(1, round(height * ratios[1])))
        crop_height = min(height, max(1, round(width / ratios[0])))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """The center of an image that was resized to just cover `size / fraction`.

    For a square equal to torchvision's Resize and CenterCrop, pixel by pixel.

    Attributes:
      size: height and width of the result, in pixels; one number for a square.
      fraction: of the side that just covers it, that remains; 0.875 is 224 of 256.
      decoder: of encoded images.
    """

    size: Size
    fraction: float = 0.875
    decoder: Decoder = decode

    def __call__(self, example: Mapping[str, Any]) -> np.ndarray:
        """uint8 (height, width, channels) of an example with `image` or `encoded`.

        Raises:
          UndecodableError: the image is damaged.
        """
        pixels = example["image"] if "image" in example else self.decoder(example["encoded"])
        size = height_width(self.size)
        rows, columns = (math.floor(length / self.fraction) for length in size)
        height, width = pixels.shape[:2]
        if rows * width >= columns * height:
            pixels = resize(pixels, rows, int(rows * width / height))
        else:
            pixels = resize(pixels, int(columns * height / width), columns)
        top, left = (
            round((length - wanted) / 2)
            for length, wanted in zip(pixels.shape[:2], size, strict=True)
        )
        return pixels[top : top + size[0], left : left + size[1]]


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes with Pillow's bilinear filter, antialiased.

    Args:
      pixels: uint8 (…, …, channels), 1 or 3 channels.
      height: of the result, in pixels.
      width: of the result, in pixels.

    Returns:
      uint8 (height, width, channels).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    gray = pixels.shape[-1] == 1
    image = Image.fromarray(pixels[..., 0] if gray else pixels)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if gray else resized


def fast_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Approximates `resize` several times faster, and equals it below half the size.

    Pillow's bilinear filter widens with the scale, so that nothing aliases when images shrink.
    OpenCV's does not widen. Before this function shrinks an image by s with OpenCV it blurs it
    with [k, 1 - 2k, k], k = (s² - 1)/12, which gives the two steps together the variance of the
    widened filter, s²/6; at s = 2 they are the same filter.

    On photographs it differs from `resize` by at most one gray level if the image grows, and by
    less than two on average if it shrinks (tests/test_data_images.py).

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
    """Taps and standard deviation of the Gaussian that is [k, 1 - 2k, k], as OpenCV takes it."""
    if scale <= 1:
        return 1, 1.0  # one tap is [1], whatever the deviation
    k = (scale**2 - 1) / 12
    return 3, math.sqrt(0.5 / math.log((1 - 2 * k) / k))
