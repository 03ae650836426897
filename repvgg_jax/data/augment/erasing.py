"""Random erasing: a rectangle of every image is lost, after normalising."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.keys import image_keys

MODES = ("pixel", "color", "zero")
ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Erasing:
    """timm's `RandomErasing` (arXiv:1708.04896) with one rectangle an image.

    A rectangle's area and the logarithm of its height over its width are drawn evenly; one that
    does not fit is drawn again, ten times at most.

    Attributes:
      probability: that an image loses a rectangle.
      mode: what comes instead: `pixel`, normal noise; `colour`, one normal value for each
        channel; `zero`, the mean colour.
      least_area: share of the image.
      most_area: share of the image.
      least_aspect: height over width; the most is one over this.
    """

    probability: float = 0.25
    mode: str = "pixel"
    least_area: float = 0.02
    most_area: float = 1 / 3
    least_aspect: float = 0.3

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Erases from normalised images float32 (images, height, width, channels)."""
        return jax.vmap(self._one)(image_keys(key, images.shape[0]), images)

    def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
        size, place, filling = jax.random.split(key, 3)
        rectangle = self.rectangle(size, place, image.shape[0], image.shape[1])
        if self.mode == "pixel":
            fill = jax.random.normal(filling, image.shape)
        elif self.mode == "color":
            fill = jnp.broadcast_to(
                jax.random.normal(filling, (1, 1, image.shape[-1])), image.shape
            )
        else:
            fill = jnp.zeros_like(image)
        return jnp.where(rectangle[..., None], fill, image)

    def rectangle(self, size: jax.Array, place: jax.Array, height: int, width: int) -> jax.Array:
        """What is erased: bool (height, width)."""
        chance, area, shape = jax.random.split(size, 3)
        bound = abs(math.log(self.least_aspect))
        areas = jax.random.uniform(
            area, (ATTEMPTS,), minval=self.least_area, maxval=self.most_area
        ) * (height * width)
        aspects = jnp.exp(jax.random.uniform(shape, (ATTEMPTS,), minval=-bound, maxval=bound))
        talls, wides = jnp.round(jnp.sqrt(areas * aspects)), jnp.round(jnp.sqrt(areas / aspects))
        fits = (talls < height) & (wides < width)
        first = fits.argmax()
        erased = fits.any() & (jax.random.uniform(chance) < self.probability)
        tall, wide = talls[first].astype(jnp.int32), wides[first].astype(jnp.int32)
        down, right = jax.random.split(place)
        top = jax.random.randint(down, (), 0, height - tall + 1)
        left = jax.random.randint(right, (), 0, width - wide + 1)
        row, column = jnp.arange(height), jnp.arange(width)
        rows, columns = (row >= top) & (row < top + tall), (column >= left) & (column < left + wide)
        return rows[:, None] & columns[None, :] & erased
