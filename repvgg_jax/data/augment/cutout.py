"""Cut-outs inside a policy: a square of one colour."""

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.kinds import Choice, Kind

CUTOUT_FILL = (125, 122, 113)
"""The colour that RepVGG's training code cuts out with; one channel takes the first."""


def cut_out(images: jax.Array, choice: Choice) -> jax.Array:
    """Paints a square; what of it lies outside the image is lost.

    Args:
      images: uint8 (images, height, width, channels).
      choice: `argument` is the side, `row` and `column` where the middle is.
    """
    _, height, width, channels = images.shape
    half = (choice.argument.astype(jnp.int32) // 2)[:, None]

    def covered(middle: jax.Array, size: int) -> jax.Array:
        centre = jnp.floor(middle * size).astype(jnp.int32)[:, None]
        place = jnp.arange(size)[None, :]
        return (place >= centre - half) & (place < centre + half)

    rows, columns = covered(choice.row, height), covered(choice.column, width)
    square = rows[:, :, None] & columns[:, None, :] & (choice.kind == Kind.CUTOUT)[:, None, None]
    colour = np.array(CUTOUT_FILL[:channels], np.uint8).reshape(1, 1, 1, -1)
    return jnp.where(square[..., None], colour, images)
