"""Random scale, rotation, blur, flip and crop of an image together with its labels.

In the order and with the numbers of hszhao/semseg (util/transform.py, tool/train.py). OpenCV does
the work there and here; the difference is that pixels stay uint8 between two operations.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.settings import Size, height_width
from repvgg_jax.segmentation.labels import IGNORE


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
        self, example: Mapping[str, Any], size: Size, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The crop that `rng` samples.

        Args:
          example: `image` uint8 (height, width, 3) and `label` uint8 (height, width).
          size: height and width of the crop, in pixels; one number for squares.
          rng: source of the random numbers; the same ones are drawn for every image.

        Returns:
          uint8 (height, width, 3) and (height, width).
        """
        size = height_width(size)
        image, label = np.asarray(example["image"]), np.asarray(example["label"])
        factor, turns, angle, blurs, flips, down, across = rng.uniform(size=7)
        image, label = self._scaled(image, label, factor)
        if turns < self.rotate:
            image, label = self._rotated(image, label, self.rotation * (2 * angle - 1))
        if blurs < self.blur:
            image = cv2.GaussianBlur(image, (5, 5), 0)
        if flips < self.flip:
            image, label = image[:, ::-1], label[:, ::-1]
        missing = [max(0, side - have) for side, have in zip(size, label.shape, strict=True)]
        # Half of the border on each side.
        image, label = _padded(image, label, missing, [n // 2 for n in missing], self.fill)
        # As an integer from 0 to the last place, all equally likely.
        top, left = (
            int(share * (length - side + 1))
            for share, length, side in zip((down, across), label.shape, size, strict=True)
        )
        part = np.s_[top : top + size[0], left : left + size[1]]
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
            turned(image, cv2.INTER_LINEAR, _color(self.fill)),
            turned(label, cv2.INTER_NEAREST, IGNORE),
        )


@dataclasses.dataclass(frozen=True)
class WholeImage:
    """An image and its labels at the one size of all evaluation images.

    Smaller ones get a border of the mean color with the label 255, to the right and below.

    Attributes:
      size: height and width, in pixels.
      fill: color of the border, 0 … 255.
    """

    size: tuple[int, int]
    fill: tuple[float, float, float] = (123.675, 116.28, 103.53)

    def __call__(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (height, width, 3) and (height, width).

        Raises:
          UndecodableError: the image is larger.
        """
        image, label = np.asarray(example["image"]), np.asarray(example["label"])
        missing = [side - have for side, have in zip(self.size, label.shape, strict=True)]
        if min(missing) < 0:
            wanted, have = ("x".join(map(str, sides)) for sides in (self.size, label.shape))
            raise UndecodableError(
                f"{example.get('name', 'an image')} has {have} pixels, more than {wanted}, the "
                "size of evaluation; set config.data.eval_size to that of the largest image"
            )
        return _padded(image, label, missing, [0, 0], self.fill)


def _padded(
    image: np.ndarray,
    label: np.ndarray,
    missing: Sequence[int],
    before: Sequence[int],
    fill: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Adds rows and columns of the border, some of them before the first."""
    if not any(missing):
        return image, label
    (top, left), (rows, columns) = before, missing
    borders = (top, rows - top, left, columns - left)
    constant = cv2.BORDER_CONSTANT
    return (
        cv2.copyMakeBorder(image, *borders, constant, value=_color(fill)),
        cv2.copyMakeBorder(label, *borders, constant, value=IGNORE),
    )


def _color(fill: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(value) for value in fill)
