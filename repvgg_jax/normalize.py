"""The one normalization of pixels: in training, evaluation, proofs and exported graphs."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Pixels on the scale 0 … 255 to zero mean and unit deviation per channel.

    Computed as `(pixels - offset) * factor` in float32. A subtraction followed by a
    multiplication cannot be contracted to a fused multiply-add, so NumPy, XLA and the runtimes
    of exported graphs all give bitwise identical results.

    Attributes:
      mean: per channel, or a single one for all channels, of pixels scaled to 0 … 1.
      std: standard deviations, per channel or a single one.

    Raises:
      ValueError: different numbers of means and deviations, or values that are not finite and
        positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        # Lists and arrays, e.g. from a config file, become tuples of plain floats.
        for field in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, field))
            object.__setattr__(self, field, values)
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"normalization: {len(self.mean)} means {self.mean} but {len(self.std)} standard "
                f"deviations {self.std}; give one of each per channel"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std) > 0):
            raise ValueError(
                f"normalization: mean {self.mean} and std {self.std} must be finite, and std above "
                "0; both are of pixels scaled to 0 … 1"
            )

    @property
    def offset(self) -> np.ndarray:
        """Subtracted from pixels on the scale 0 … 255: float32 (channels,) or (1,)."""
        return (255 * np.asarray(self.mean, np.float64)).astype(np.float32)

    @property
    def factor(self) -> np.ndarray:
        """What the difference is multiplied by: float32 (channels,) or (1,)."""
        return (1 / (255 * np.asarray(self.std, np.float64))).astype(np.float32)

    def __call__(self, pixels: Any) -> Any:
        """float32 images from pixels (images, height, width, channels), NumPy or JAX.

        Args:
          pixels: on the scale 0 … 255, uint8 or floating point.
        """
        shape = (1,) * (pixels.ndim - 1) + (-1,)  # no implicit rank promotion
        pixels = pixels.astype(np.float32)
        return (pixels - self.offset.reshape(shape)) * self.factor.reshape(shape)
