"""What happens to images on the device, inside the compiled step."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Augment = Callable[[jax.Array, jax.Array], jax.Array]
"""(key, float images in [0, 1]) -> images of the same shape."""


@dataclasses.dataclass(frozen=True)
class Normalise:
    """Pixels 0 … 255 to zero mean and unit deviation per channel.

    Attributes:
      mean: of every channel, on the scale 0 … 1.
      std: of every channel, on the scale 0 … 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self,
        images: jax.Array | np.ndarray,
        augment: Augment | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """float32 images from uint8 ones (images, height, width, channels).

        Args:
          images: as the source gives them.
          augment: applied in between, to pixels in [0, 1].
          key: of the augmentation.
        """
        pixels = jnp.asarray(images, jnp.float32) / 255
        if augment is not None and key is not None:
            pixels = augment(key, pixels)
        mean, std = (
            np.reshape(np.array(v, np.float32), (1, 1, 1, -1)) for v in (self.mean, self.std)
        )
        return (pixels - mean) / std


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Rotates, scales, shears and shifts every image at random, about its centre.

    Amounts are drawn uniformly from [-x, x]; resampling is bilinear, outside is black.

    Attributes:
      rotation: degrees.
      scale: relative change of size, of height and width separately.
      shear: shift of a column per row.
      shift: share of the image's size.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Transforms (images, height, width, channels), each by its own key."""
        return jax.vmap(self._one)(jax.random.split(key, images.shape[0]), images)

    def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        angle, tall, wide, shear, down, right = jax.random.uniform(key, (6,), minval=-1, maxval=1)
        angle = jnp.deg2rad(self.rotation) * angle
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        size_shear = jnp.array(
            [[1 + self.scale * tall, self.shear * shear], [0.0, 1 + self.scale * wide]]
        )
        matrix = jnp.array([[cos, -sin], [sin, cos]]) @ size_shear
        centre = jnp.array([[(height - 1) / 2], [(width - 1) / 2]])
        offset = self.shift * jnp.array([[height * down], [width * right]])
        rows, columns = jnp.indices((height, width), dtype=jnp.float32).reshape(2, -1)
        where = matrix @ (jnp.stack([rows, columns]) - centre) + centre + offset
        moved = jax.vmap(
            lambda channel: jax.scipy.ndimage.map_coordinates(
                channel, list(where), order=1, mode="constant"
            ),
            in_axes=-1,
            out_axes=-1,
        )(image)
        return moved.reshape(image.shape)


def make_augment(name: str, **options: float) -> Augment | None:
    """The augmentation that `config.data.augment` names; `none` gives None.

    Raises:
      ValueError: unknown name.
    """
    if name == "none":
        return None
    if name == "affine":
        return RandomAffine(**options)
    raise ValueError(
        f"unknown augmentation {name!r} in config.data.augment; there are: none, affine"
    )
