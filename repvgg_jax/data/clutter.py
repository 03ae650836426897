"""Digits on photographs: a harder classification task from real images, without any download.

The class of an image is that of its middle digit. Parts of two others are beside it, as in numbers
of houses. Digits are turned, sheared, thick or thin, and lighter or darker than the crop of a
photograph behind them, and a patch of a photograph covers a part. Digits and photographs come with
scikit-learn. Validation images show digits and parts of the photographs that no training image
shows.
"""

import dataclasses
import functools

import cv2
import numpy as np

from repvgg_jax.data.sources import ArraySource, load_digits

CLUTTER_SIZE = 32
"""Height and width of an image, in pixels."""

TRAINING_IMAGES, VALIDATION_IMAGES = 8000, 2000

_SIDES = (18.0, 24.0)  # of a digit, pixels
_SHIFT = 2.5  # of the middle digit's center from that of the image, pixels
_DISTANCE = (15.0, 19.0)  # between digits' centers, pixels
_ANGLE = 15.0  # degrees to each side
_SHEAR = 0.2  # columns per row
_CROP = (40, 160)  # side of the part of a photograph that is behind an image, pixels
_SHARE = 0.7  # of a photograph's columns that training sees; validation sees the others
_CONTRAST = (60.0, 150.0)  # gray levels between digits and what is behind them
_NOISE = 5.0  # gray levels


@dataclasses.dataclass(frozen=True)
class Clutter:
    """Makes images, each a function of (seed, index) alone.

    Attributes:
      digits: images uint8 (n, 8, 8, 1) and their digits (n,).
      photographs: uint8 (height, width, 3) each, larger than `_CROP`.
      seed: of the images.
    """

    digits: ArraySource
    photographs: tuple[np.ndarray, ...]
    seed: int

    def make(self, index: int) -> tuple[np.ndarray, int]:
        """Image number `index`, uint8 (32, 32, 3), and its class."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 2], counter=[0, 0, 0, index]))
        image = self._background(rng)
        gray = image.mean()
        sign = 1 if gray < rng.uniform(80, 175) else -1  # lighter or darker
        middle = CLUTTER_SIZE / 2 - 0.5 + rng.uniform(-_SHIFT, _SHIFT, 2)
        three = rng.integers(0, len(self.digits), 3)
        for number, place in zip(three, (-1, 1, 0), strict=True):  # the middle one on top
            side = rng.uniform(*_SIDES)
            center = middle + place * np.array([rng.uniform(*_DISTANCE), 0.0])
            ink = _placed(self.digits.images[number, ..., 0], side, center, rng)
            color = np.clip(gray + sign * rng.uniform(*_CONTRAST), 0, 255) + rng.uniform(-30, 30, 3)
            image += ink[..., None] * (color.astype(np.float32) - image)
        self._cover(image, rng)
        image += _NOISE * rng.standard_normal(image.shape, np.float32)
        return np.clip(image, 0, 255).round().astype(np.uint8), int(self.digits.labels[three[2]])

    def _crop(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """A part of a photograph: float32 (height, width, 3)."""
        photograph = self.photographs[rng.integers(len(self.photographs))]
        side = int(rng.integers(*_CROP))
        row = rng.integers(photograph.shape[0] - side + 1)
        column = rng.integers(photograph.shape[1] - side + 1)
        part = photograph[row : row + side, column : column + side]
        return cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        image = self._crop(rng, (CLUTTER_SIZE, CLUTTER_SIZE))
        mean = image.mean()
        return mean + rng.uniform(0.4, 0.8) * (image - mean)

    def _cover(self, image: np.ndarray, rng: np.random.Generator) -> None:
        """Puts a patch of a photograph over a part, in place."""
        height, width = rng.integers(3, 8, 2)
        row, column = rng.integers(4, CLUTTER_SIZE - 8, 2)
        region = image[row : row + height, column : column + width]
        region[:] = self._crop(rng, (height, width))[: region.shape[0], : region.shape[1]]


def _placed(
    digit: np.ndarray, side: float, center: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """How much ink of a digit is at every pixel, 0 … 1."""
    angle, scale = np.deg2rad(rng.uniform(-_ANGLE, _ANGLE)), side / digit.shape[0]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = scale * turn @ np.array([[1, rng.uniform(-_SHEAR, _SHEAR)], [0, 1]])
    middle = (np.array(digit.shape) - 1) / 2
    matrix = np.column_stack([turn, center - turn @ middle])
    shape = (CLUTTER_SIZE, CLUTTER_SIZE)
    ink = cv2.warpAffine(digit.astype(np.float32) / 255, matrix, shape, flags=cv2.INTER_CUBIC)
    threshold = rng.uniform(0.25, 0.5)  # a thick or a thin pen
    return np.clip((ink - threshold) / 0.3 + 0.5, 0, 1)


@functools.cache
def load_clutter(
    seed: int = 0, training: int = TRAINING_IMAGES, validation: int = VALIDATION_IMAGES
) -> tuple[ArraySource, ArraySource, tuple[str, ...]]:
    """Training images, validation images and class names.

    The digits of the two are those of `load_digits`, and the photographs are scikit-learn's,
    `china.jpg` and `flower.jpg`, of which training sees the left part and validation the rest.

    Args:
      seed: of the images.
      training: number of training images.
      validation: number of validation images.
    """
    from sklearn import datasets

    train, evaluation, classes = load_digits()
    photographs = datasets.load_sample_images().images
    made = []
    for digits, count, own_seed, learns in (
        (train, training, seed, True),
        (evaluation, validation, seed + 1, False),
    ):
        parts = []
        for photograph in photographs:
            border = int(_SHARE * photograph.shape[1])
            parts.append(photograph[:, :border] if learns else photograph[:, border:])
        assert min(min(part.shape[:2]) for part in parts) > _CROP[1]
        assert isinstance(digits, ArraySource)
        clutter = Clutter(digits, tuple(parts), own_seed)
        images, labels = zip(*(clutter.make(index) for index in range(count)), strict=True)
        made.append(ArraySource(np.stack(images), np.array(labels, np.int64)))
    return made[0], made[1], classes
