"""Small random rotations, scales, shears and shifts, for images that are small themselves."""

import dataclasses

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.keys import image_keys


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
        return jax.vmap(self._one)(image_keys(key, images.shape[0]), images)

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
