"""Encoded images to uint8 pixels: decoding, resizing, and the crop that the network gets.

Crops are random in training and from the center in evaluation; everything else happens on the
device. This is the only place that chooses a decoder: JPEG files go to simplejpeg, the fastest of
those that `benchmarks/input_pipeline.py` compares, and the only fast one that reports damaged
data. Everything else goes to Pillow: CMYK JPEGs, which other decoders do not convert, PNG and all
other formats, and whatever simplejpeg rejects, because it also rejects harmless oddities. An image
is undecodable if Pillow rejects it.

EXIF rotations are not applied, as in other frameworks' ImageNet pipelines.
"""

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

REDUCTIONS = (8, 4, 2)
"""Factors by which decoding can shrink a JPEG for less work, the largest first."""

CROP_ATTEMPTS = 10  # at a crop that fits into the image, as in torchvision

# A worker is a process; threads of OpenCV's own would only compete with the other workers.
cv2.setNumThreads(1)


class UndecodableError(ValueError):
    """Data that no decoder can read; the text is the reason, without the image's name."""


def image_size(encoded: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
      UndecodableError: no known header.
    """
    header = _jpeg_header(encoded)
    if header is not None:
        return header[0], header[1]
    with _opened(encoded) as image:
        return image.height, image.width


def decode(encoded: bytes, reduction: int = 1, *, fast_upsample: bool = False) -> np.ndarray:
    """Decodes an image.

    Args:
      encoded: a JPEG, PNG or other file that Pillow reads.
      reduction: 1, 2, 4 or 8: divides height and width, rounding up, in the frequency domain of
        a JPEG, which takes less time. Other formats ignore it; look at the shape.
      fast_upsample: repeat the values of JPEGs that store color at half the resolution, instead
        of interpolating them as Pillow does. Brightness is the same.

    Returns:
      RGB, uint8 (height, width, 3).

    Raises:
      UndecodableError: damaged, or not an image.
    """
    header = _jpeg_header(encoded)
    if header is not None and header[2] not in ("CMYK", "YCCK"):
        height, width = (math.ceil(length / reduction) for length in header[:2])
        try:
            return simplejpeg.decode_jpeg(
                encoded,
                "RGB",
                fastupsample=fast_upsample,
                min_height=height,
                min_width=width,
                min_factor=reduction,
            )
        except ValueError:
            pass  # Pillow tells damage from oddity
    with _opened(encoded) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's plugins raise anything
            raise UndecodableError(str(error) or type(error).__name__) from error


def is_plain_jpeg(encoded: bytes) -> bool:
    """Whether it is a gray or RGB JPEG, which fast decoders read."""
    header = _jpeg_header(encoded)
    return header is not None and header[2] not in ("CMYK", "YCCK")


def _jpeg_header(encoded: bytes) -> tuple[int, int, str, str] | None:
    if not encoded.startswith(b"\xff\xd8"):
        return None
    try:
        return simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None


def _opened(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        what = f"{len(encoded):,} bytes of no known image format" if encoded else "an empty file"
        raise UndecodableError(what) from error
    except Exception as error:  # Pillow's plugins raise anything
        raise UndecodableError(str(error) or type(error).__name__) from error


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random crop of an image, resized to a square.

    Source: C. Szegedy et al., Going Deeper with Convolutions, section 6; the numbers and the
    fallback after ten attempts are torchvision's.

    Attributes:
      scale: smallest and largest fraction of the image's area.
      ratio: smallest and largest width/height; its logarithm is uniform.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(
        self, example: Mapping[str, Any], size: int, rng: np.random.Generator
    ) -> np.ndarray:
        """The crop that `rng` samples.

        A crop of a JPEG that is at least 2, 4 or 8 times as large as `size` is decoded at that
        reduction, its edges rounded to multiples of it, and color is not interpolated before it
        is resized. On sharp photographs the result is within 4 gray levels on average of decoding
        all pixels and resizing with Pillow (tests/test_data_images.py).

        Args:
          example: with `image` or `encoded`.
          size: height and width of the result, in pixels.
          rng: source of the random numbers.

        Returns:
          uint8 (size, size, channels).

        Raises:
          UndecodableError: the image is damaged.
        """
        if "image" in example:
            pixels = example["image"]
            top, left, height, width = self.sample(pixels.shape[0], pixels.shape[1], rng)
        else:
            full_height, full_width = image_size(example["encoded"])
            top, left, height, width = self.sample(full_height, full_width, rng)
            reduction = next((r for r in REDUCTIONS if min(height, width) >= r * size), 1)
            pixels = decode(example["encoded"], reduction, fast_upsample=True)
            if pixels.shape[:2] != (full_height, full_width):
                top, left, height, width = (
                    round(length / reduction) for length in (top, left, height, width)
                )
        return fast_resize(pixels[top : top + height, left : left + width], size, size)

    def sample(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop of an image, in pixels."""
        low, high = (math.log(ratio) for ratio in self.ratio)
        for _ in range(CROP_ATTEMPTS):
            share, shape, down, across = rng.random(4).tolist()
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + shape * (high - low))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(down * (height - crop_height + 1))
                left = int(across * (width - crop_width + 1))
                return top, left, crop_height, crop_width
        # The image is longer than any crop may be: its center, in the nearest shape.
        crop_width = min(width, max(1, round(height * self.ratio[1])))
        crop_height = min(height, max(1, round(width / self.ratio[0])))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """The center of an image whose short side was resized to `size / fraction`.

    Equal to torchvision's Resize and CenterCrop, pixel by pixel.

    Attributes:
      size: height and width of the result, in pixels.
      fraction: of the short side, that remains; 0.875 is 224 of 256.
    """

    size: int
    fraction: float = 0.875

    def __call__(self, example: Mapping[str, Any]) -> np.ndarray:
        """uint8 (size, size, channels) of an example with `image` or `encoded`.

        Raises:
          UndecodableError: the image is damaged.
        """
        pixels = example["image"] if "image" in example else decode(example["encoded"])
        short = math.floor(self.size / self.fraction)
        height, width = pixels.shape[:2]
        if height <= width:
            pixels = resize(pixels, short, int(short * width / height))
        else:
            pixels = resize(pixels, int(short * height / width), short)
        top, left = (round((length - self.size) / 2) for length in pixels.shape[:2])
        return pixels[top : top + self.size, left : left + self.size]


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
