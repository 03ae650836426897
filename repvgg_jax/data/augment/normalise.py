"""Pixels to what the network takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Normalise:
    """Pixels 0 … 255 to zero mean and unit deviation per channel.

    Attributes:
      mean: of every channel, on the scale 0 … 1.
      std: of every channel, on the scale 0 … 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """float32 images from uint8 ones (images, height, width, channels)."""
        return self.standardise(jnp.asarray(images, jnp.float32) / 255)

    def standardise(self, pixels: jax.Array) -> jax.Array:
        """The same from float32 pixels in [0, 1]."""
        mean, std = (
            np.reshape(np.array(v, np.float32), (1, 1, 1, -1)) for v in (self.mean, self.std)
        )
        return (pixels - mean) / std
