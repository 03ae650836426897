"""Scenes of handwritten digits with a class per pixel: segmentation without any download.

Each scene shows some of scikit-learn's real digits, enlarged, turned, colored and overlapping, on
a textured background. A scene is a function of (seed, number) alone. Scenes for validation show
digits that no training scene has.
"""

import dataclasses

import cv2
import numpy as np

from repvgg_jax.data.sources import ArraySource, load_digits

SCENE_SIZE = 64
"""Height and width of a scene, in pixels."""

SCENE_CLASSES = ("background", *(f"digit {digit}" for digit in range(10)))

TRAINING_SCENES, VALIDATION_SCENES = 8000, 200

_DIGITS = (2, 3)  # per scene, least and most
_SIDE = (28.0, 40.0)  # of a digit, pixels
_DISTANCE = 0.75  # between two digits' centers, as a fraction of their mean side, at least
_PLACES = 40  # tried for a digit; it is left out if it would cover too much of another
_ANGLE = 15.0  # degrees to each side
_INK = 0.25  # fraction of full ink from which a pixel belongs to the digit
_CONTRAST = 70.0  # gray levels between a digit and the background, at least


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """Scenes made when they are asked for.

    `source[i]` is `{"image": uint8 (size, size, 3), "label": uint8 (size, size)}`, with 0 for the
    background and 1 + d for digit d.

    Attributes:
      digits: images uint8 (n, 8, 8, 1) and their digits (n,).
      count: number of scenes.
      seed: of the scenes.
      size: height and width, in pixels.
    """

    digits: ArraySource
    count: int
    seed: int
    size: int = SCENE_SIZE

    def __len__(self) -> int:
        """Number of scenes."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Scene number `index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 1], counter=[0, 0, 0, index]))
        image = self._background(rng)
        label = np.zeros((self.size, self.size), np.uint8)
        for number, side, center in self._layout(rng):
            ink = self._placed(self.digits.images[number, ..., 0], side, center, rng)
            inside = ink > _INK
            color = self._color(image[inside].mean(axis=0), rng)
            # Soft edges around the threshold, as a camera would see them.
            cover = np.clip((ink - _INK) / 0.2 + 0.5, 0, 1)[..., None]
            image += cover * (color - image)
            label[inside] = 1 + self.digits.labels[number]
        image += 6 * rng.standard_normal(image.shape, np.float32)
        return {"image": np.clip(image, 0, 255).round().astype(np.uint8), "label": label}

    def _layout(self, rng: np.random.Generator) -> list[tuple[int, float, np.ndarray]]:
        """Numbers, sides and centers of digits, which overlap without covering each other."""
        found: list[tuple[int, float, np.ndarray]] = []
        for number in rng.integers(0, len(self.digits), rng.integers(*_DIGITS, endpoint=True)):
            side = rng.uniform(*_SIDE)
            for center in rng.uniform(0.45 * side, self.size - 0.45 * side, (_PLACES, 2)):
                if all(
                    np.linalg.norm(center - other) > _DISTANCE * (side + width) / 2
                    for _, width, other in found
                ):
                    found.append((int(number), side, center))
                    break
        return found

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """Smooth colors, and waves across them: float32 (size, size, 3)."""
        size = self.size
        colors = rng.uniform(40, 215, (4, 4, 3)).astype(np.float32)
        smooth = cv2.resize(colors, (size, size), interpolation=cv2.INTER_CUBIC)
        row, column = np.ogrid[:size, :size]
        angle, length = rng.uniform(0, np.pi), rng.uniform(5, 20)
        across = np.cos(angle) * column + np.sin(angle) * row
        wave = np.sin(2 * np.pi * (across / length + rng.uniform()))
        return smooth + (rng.uniform(5, 30) * wave[..., None]).astype(np.float32)

    def _placed(
        self, digit: np.ndarray, side: float, center: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """How much ink of a digit is at every pixel, 0 … 1."""
        angle = np.deg2rad(rng.uniform(-_ANGLE, _ANGLE))
        scale = side / digit.shape[0]
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        middle = (np.array(digit.shape) - 1) / 2
        matrix = np.column_stack([turn, center - turn @ middle])
        return cv2.warpAffine(
            digit.astype(np.float32) / 255, matrix, (self.size, self.size), flags=cv2.INTER_CUBIC
        )

    def _color(self, below: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A color that stands out from the mean color below it."""
        while True:
            color = rng.uniform(0, 255, 3).astype(np.float32)
            if abs(color.mean() - below.mean()) > _CONTRAST:
                return color


def load_digits_scenes(
    seed: int = 0,
) -> tuple[SceneSource, SceneSource, tuple[str, ...]]:
    """Training scenes, validation scenes and class names.

    The digits of the two are those of `load_digits`: none is in both.

    Args:
      seed: of the scenes.
    """
    train, evaluation, _ = load_digits()
    assert isinstance(train, ArraySource)
    assert isinstance(evaluation, ArraySource)
    return (
        SceneSource(train, TRAINING_SCENES, seed),
        SceneSource(evaluation, VALIDATION_SCENES, seed + 1),
        SCENE_CLASSES,
    )
