"""Random scale, rotation, blur, flip and crop of an image together with its labels.

In the order and with the numbers of hszhao/semseg (util/transform.py, tool/train.py). OpenCV does
the work there and here; the difference is that pixels stay uint8 between two operations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from repvgg_jax.data.masks import IGNORE


@dataclasses.dataclass(frozen=True)
class JointCrop:
    """A training crop of an image and its labels.

    The image is resampled bilinearly, labels by nearest neighbor. What comes from outside the
    image has the mean color and the label 255.

    Attributes:
      scale: smallest and largest factor of the image's size.
      rotation: degrees, to each side.
      rotate: probability of a rotation.
      blur: probability of a 5x5 Gaussian blur.
      flip: probability of a mirror image.
      fill: color outside the image, 0 … 255.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    rotation: float = 10.0
    rotate: float = 0.5
    blur: float = 0.5
    flip: float = 0.5
    fill: tuple[float, float, float] = (123.675, 116.28, 103.53)

    def __call__(
        self, example: Mapping[str, Any], size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The crop that `rng` samples.

        Args:
          example: `image` uint8 (height, width, 3) and `label` uint8 (height, width).
          size: height and width of the crop, in pixels.
          rng: source of the random numbers; the same ones are drawn for every image.

        Returns:
          uint8 (size, size, 3) and (size, size).
        """
        image, label = np.asarray(example["image"]), np.asarray(example["label"])
        factor, turns, angle, blurs, flips, down, across = rng.uniform(size=7)
        image, label = self._scaled(image, label, factor)
        if turns < self.rotate:
            image, label = self._rotated(image, label, self.rotation * (2 * angle - 1))
        if blurs < self.blur:
            image = cv2.GaussianBlur(image, (5, 5), 0)
        if flips < self.flip:
            image, label = image[:, ::-1], label[:, ::-1]
        image, label = self._padded(image, label, size)
        # As an integer from 0 to the last place, all equally likely.
        top, left = (
            int(share * (length - size + 1))
            for share, length in zip((down, across), label.shape, strict=True)
        )
        part = np.s_[top : top + size, left : left + size]
        return np.ascontiguousarray(image[part]), np.ascontiguousarray(label[part])

    def _scaled(
        self, image: np.ndarray, label: np.ndarray, factor: float
    ) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.scale
        factor = low + (high - low) * factor
        if factor == 1:
            return image, label
        height, width = (max(1, round(side * factor)) for side in label.shape)
        size = (width, height)
        return (
            cv2.resize(image, size, interpolation=cv2.INTER_LINEAR),
            cv2.resize(label, size, interpolation=cv2.INTER_NEAREST),
        )

    def _rotated(
        self, image: np.ndarray, label: np.ndarray, degrees: float
    ) -> tuple[np.ndarray, np.ndarray]:
        height, width = label.shape
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)

        def turned(array: np.ndarray, how: int, outside: Any) -> np.ndarray:
            return cv2.warpAffine(array, matrix, (width, height), flags=how, borderValue=outside)

        return (
            turned(image, cv2.INTER_LINEAR, self._outside),
            turned(label, cv2.INTER_NEAREST, IGNORE),
        )

    def _padded(
        self, image: np.ndarray, label: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """At least as large as the crop, with half of the border on each side."""
        missing = [max(0, size - side) for side in label.shape]
        if not any(missing):
            return image, label
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
        borders = (top, bottom, left, right)
        return (
            cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=self._outside),
            cv2.copyMakeBorder(label, *borders, cv2.BORDER_CONSTANT, value=IGNORE),
        )

    @property
    def _outside(self) -> tuple[int, ...]:
        return tuple(round(value) for value in self.fill)
