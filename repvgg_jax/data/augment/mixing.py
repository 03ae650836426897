"""Mixup and cutmix: an image gets something of another, and its target as much of the other's."""

import dataclasses

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.keys import Stage, image_keys, stage_key


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Mixes every image with its mirror image in the order of its group.

    The first image of a group with the last, the second with the one before the last: batches
    are shuffled, so this is as random as any pairing. One share, and for cutmix one rectangle,
    for each group, from Beta(alpha, alpha). timm's `Mixup` in the mode `batch` does this in the
    batch of each process; a group of 32 is what RepVGG's eight processes of 32 images do. A
    group that lies on one device costs no communication; the whole batch as one group sends
    every device's images once to the device opposite.

    Attributes:
      mixup: alpha of mixup (arXiv:1710.09412); 0: never.
      cutmix: alpha of cutmix (arXiv:1905.04899); 0: never. With both, a coin decides.
      group: images that are mixed among themselves; 0: the whole batch.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    group: int = 0

    def __call__(
        self, key: jax.Array, images: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Mixed images and targets, float32.

        Args:
          key: of the step.
          images: normalised, float32 (images, height, width, channels).
          targets: a distribution for each image, float32 (images, classes).

        Raises:
          ValueError: the batch is not a multiple of the group.
        """
        count, height, width, _ = images.shape
        group = self.group or count
        if count % group:
            raise ValueError(
                f"config.augment.mix_group={group} does not divide a batch of {count} images"
            )
        keys = image_keys(stage_key(key, Stage.MIX), count // group)
        masks, kept = jax.vmap(lambda one: self.shares(one, height, width))(keys)

        def mix(values: jax.Array, share: jax.Array) -> jax.Array:
            grouped = values.reshape(count // group, group, *values.shape[1:])
            return (grouped * share + grouped[:, ::-1] * (1 - share)).reshape(values.shape)

        return mix(images, masks[:, None, :, :, None]), mix(targets, kept[:, None, None])

    def shares(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """What a group's images keep of themselves: at each pixel and of their targets.

        The first is one number for mixup; for cutmix it is 0 in a rectangle and 1 around it.

        Returns:
          float32 (height, width) and ().
        """
        coin, share, place = jax.random.split(key, 3)
        pixels, kept = jnp.ones((height, width)), jnp.ones(())
        if self.mixup:
            kept = jax.random.beta(share, self.mixup, self.mixup)
            pixels = jnp.full((height, width), kept)
        if self.cutmix:
            around = self._around(place, height, width)
            cut = jax.random.bernoulli(coin) if self.mixup else jnp.array(True)
            pixels = jnp.where(cut, around, pixels)
            # Counted in integers: a float32 mean would depend on the order of its sum.
            kept = jnp.where(cut, around.sum() / (height * width), kept)
        return pixels, kept

    def _around(self, key: jax.Array, height: int, width: int) -> jax.Array:
        """All but a rectangle in the image's proportions, which can reach over the edges: bool."""
        share, down, right = jax.random.split(key, 3)
        side = jnp.sqrt(1 - jax.random.beta(share, self.cutmix, self.cutmix))

        def covered(key: jax.Array, size: int) -> jax.Array:
            half = jnp.floor(size * side).astype(jnp.int32) // 2
            centre = jax.random.randint(key, (), 0, size)
            place = jnp.arange(size)
            return (place >= centre - half) & (place < centre + half)

        return ~(covered(down, height)[:, None] & covered(right, width)[None, :])
