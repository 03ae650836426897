"""What a network sees of an image: a random part in training, the centre when it is judged.

Both end in uint8 pixels; everything else happens on the device.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from repvgg_jax.data import decoding
from repvgg_jax.data.resizing import resize, resize_quickly

ATTEMPTS = 10  # at a part that fits into the image, as in torchvision


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of an image, brought to a square.

    Source: C. Szegedy et al., Going Deeper with Convolutions, section 6; the numbers and the
    way out after ten attempts are torchvision's.

    Attributes:
      scale: smallest and largest share of the image's area.
      ratio: smallest and largest width/height; its logarithm is uniform.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(
        self, example: Mapping[str, Any], size: int, rng: np.random.Generator
    ) -> np.ndarray:
        """The part that `rng` picks.

        A part of a JPEG that is at least 2, 4 or 8 times as large as `size` is decoded at that
        fraction, its edges rounded to multiples of it, and colour is not interpolated before it
        is resized. On sharp photographs the result is within 4 grey levels on average of decoding
        all pixels and resizing with Pillow (tests/test_data_views.py).

        Args:
          example: with `image` or `encoded`.
          size: height and width to give, in pixels.
          rng: is asked for numbers.

        Returns:
          uint8 (size, size, channels).

        Raises:
          UndecodableError: the image is damaged.
        """
        if "image" in example:
            pixels = example["image"]
            top, left, height, width = self.part(pixels.shape[0], pixels.shape[1], rng)
        else:
            full_height, full_width = decoding.size(example["encoded"])
            top, left, height, width = self.part(full_height, full_width, rng)
            reduction = next((r for r in decoding.REDUCTIONS if min(height, width) >= r * size), 1)
            pixels = decoding.decode(example["encoded"], reduction, quickly=True)
            if pixels.shape[:2] != (full_height, full_width):
                top, left, height, width = (
                    round(length / reduction) for length in (top, left, height, width)
                )
        return resize_quickly(pixels[top : top + height, left : left + width], size, size)

    def part(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random part of an image, in pixels."""
        low, high = (math.log(ratio) for ratio in self.ratio)
        for _ in range(ATTEMPTS):
            share, shape, down, across = rng.random(4).tolist()
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + shape * (high - low))
            part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < part_width <= width and 0 < part_height <= height:
                top = int(down * (height - part_height + 1))
                left = int(across * (width - part_width + 1))
                return top, left, part_height, part_width
        # The image is longer than any part may be: its centre, in the nearest shape.
        part_width = min(width, max(1, round(height * self.ratio[1])))
        part_height = min(height, max(1, round(width / self.ratio[0])))
        return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """The centre of an image whose short side was brought to `size / fraction`.

    Equal to torchvision's Resize and CenterCrop, pixel by pixel.

    Attributes:
      size: height and width to give, in pixels.
      fraction: of the short side, that remains; 0.875 is 224 of 256.
    """

    size: int
    fraction: float = 0.875

    def __call__(self, example: Mapping[str, Any]) -> np.ndarray:
        """uint8 (size, size, channels) of an example with `image` or `encoded`.

        Raises:
          UndecodableError: the image is damaged.
        """
        pixels = example["image"] if "image" in example else decoding.decode(example["encoded"])
        short = math.floor(self.size / self.fraction)
        height, width = pixels.shape[:2]
        if height <= width:
            pixels = resize(pixels, short, int(short * width / height))
        else:
            pixels = resize(pixels, int(short * height / width), short)
        top, left = (round((length - self.size) / 2) for length in pixels.shape[:2])
        return pixels[top : top + self.size, left : left + self.size]
