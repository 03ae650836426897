"""What an artefact tells its users: how images are normalised, what the classes are called."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The part of a trained network that is not in its weights.

    Decoding and resizing are no part of it: libraries differ in both, so images arrive at
    the size that the network was trained for.

    Attributes:
      mean: of every channel, or one for all, of pixels scaled to 0 … 1.
      std: likewise.
      labels: name of every class in the order of the logits; empty where nobody knows them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Lists and arrays (from a config file, say) become plain tuples, fit for JSON.
        for field, kind in (("mean", float), ("std", float), ("labels", str)):
            object.__setattr__(self, field, tuple(kind(value) for value in getattr(self, field)))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"metadata: {len(self.mean)} means {self.mean} but {len(self.std)} standard "
                f"deviations {self.std}; give one of each for every channel"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std) > 0):
            raise ValueError(
                f"metadata: mean {self.mean} and std {self.std} must be finite, and std above 0; "
                "both are of pixels scaled to 0 … 1"
            )

    @property
    def scale(self) -> np.ndarray:
        """What a pixel of 0 … 255 is multiplied by, float32 (channels,) or (1,)."""
        return (1 / (255 * np.asarray(self.std, np.float64))).astype(np.float32)

    @property
    def shift(self) -> np.ndarray:
        """What is added after that, float32 (channels,) or (1,)."""
        return (-np.asarray(self.mean, np.float64) / np.asarray(self.std)).astype(np.float32)

    def normalise(self, images: Any) -> Any:
        """Images as decoders give them become what the network was trained on.

        Args:
          images: uint8 (images, height, width, channels), NumPy or JAX.

        Returns:
          float32 of the same shape, (pixels / 255 - mean) / std.
        """
        row = (1, 1, 1, -1)
        return images.astype(np.float32) * self.scale.reshape(row) + self.shift.reshape(row)
