"""Everything that happens to the images of a batch on the device, in order.

Operations and policies on uint8 pixels are in `ops.py` and `policies.py`. Small affine changes,
random erasing, mixup and cutmix, on floating-point images, are here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.base import Stage, image_keys, stage_key
from repvgg_jax.data.augment.ops import RGB_OPS, apply_in_turn
from repvgg_jax.data.augment.policies import AutoAugment, ColorJitter, Policy, RandAugment, Raug15
from repvgg_jax.data.settings import AugmentSettings
from repvgg_jax.normalize import Normalize


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Rotates, scales, shears and shifts every image at random, about its center.

    For images that are small themselves. Amounts are uniform in [-x, x]; resampling is bilinear,
    outside is black.

    Attributes:
      rotation: degrees.
      scale: relative change of size, of height and width separately.
      shear: shift of a column per row.
      shift: fraction of the image's size.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Transforms float32 (images, height, width, channels), each with its own key."""
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
        center = jnp.array([[(height - 1) / 2], [(width - 1) / 2]])
        offset = self.shift * jnp.array([[height * down], [width * right]])
        rows, columns = jnp.indices((height, width), dtype=jnp.float32).reshape(2, -1)
        source = matrix @ (jnp.stack([rows, columns]) - center) + center + offset
        moved = jax.vmap(
            lambda channel: jax.scipy.ndimage.map_coordinates(
                channel, list(source), order=1, mode="constant"
            ),
            in_axes=-1,
            out_axes=-1,
        )(image)
        return moved.reshape(image.shape)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """timm's `RandomErasing` (arXiv:1708.04896) with one rectangle per image.

    The area of the rectangle and the logarithm of its aspect ratio are uniform; one that does not
    fit is sampled again, up to ten times.

    Attributes:
      probability: that a rectangle of an image is erased.
      mode: what replaces it: `pixel`, normal noise; `color`, one normal value per channel;
        `zero`, the mean color.
      least_area: fraction of the image.
      most_area: fraction of the image.
      least_aspect: height over width; the largest is its inverse.
    """

    probability: float = 0.25
    mode: str = "pixel"
    least_area: float = 0.02
    most_area: float = 1 / 3
    least_aspect: float = 0.3

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Erases from normalized images float32 (images, height, width, channels)."""
        return jax.vmap(self._one)(image_keys(key, images.shape[0]), images)

    def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
        size_key, position_key, fill_key = jax.random.split(key, 3)
        rectangle = self.rectangle(size_key, position_key, image.shape[0], image.shape[1])
        if self.mode == "pixel":
            fill = jax.random.normal(fill_key, image.shape)
        elif self.mode == "color":
            fill = jnp.broadcast_to(
                jax.random.normal(fill_key, (1, 1, image.shape[-1])), image.shape
            )
        else:
            fill = jnp.zeros_like(image)
        return jnp.where(rectangle[..., None], fill, image)

    def rectangle(
        self, size_key: jax.Array, position_key: jax.Array, height: int, width: int
    ) -> jax.Array:
        """Mask of the erased pixels: bool (height, width)."""
        erase_key, area_key, aspect_key = jax.random.split(size_key, 3)
        bound = abs(math.log(self.least_aspect))
        areas = jax.random.uniform(
            area_key, (ERASE_ATTEMPTS,), minval=self.least_area, maxval=self.most_area
        ) * (height * width)
        aspects = jnp.exp(
            jax.random.uniform(aspect_key, (ERASE_ATTEMPTS,), minval=-bound, maxval=bound)
        )
        talls, wides = jnp.round(jnp.sqrt(areas * aspects)), jnp.round(jnp.sqrt(areas / aspects))
        fits = (talls < height) & (wides < width)
        first = fits.argmax()
        erased = fits.any() & (jax.random.uniform(erase_key) < self.probability)
        tall, wide = talls[first].astype(jnp.int32), wides[first].astype(jnp.int32)
        top_key, left_key = jax.random.split(position_key)
        top = jax.random.randint(top_key, (), 0, height - tall + 1)
        left = jax.random.randint(left_key, (), 0, width - wide + 1)
        row, column = jnp.arange(height), jnp.arange(width)
        rows, columns = (row >= top) & (row < top + tall), (column >= left) & (column < left + wide)
        return rows[:, None] & columns[None, :] & erased


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix of every image with its mirror image in the order of its group.

    The first image of a group is mixed with the last, the second with the one before the last:
    batches are shuffled, so this is as random as any pairing. One weight, and for cutmix one
    rectangle, per group, from Beta(alpha, alpha). timm's `Mixup` in its mode `batch` does this in
    the batch of each process; a group of 32 corresponds to RepVGG's eight processes of 32 images.
    A group within one device needs no communication; the whole batch as one group sends the
    images of each device once to the opposite device.

    Attributes:
      mixup: alpha of mixup (arXiv:1710.09412); 0 is off.
      cutmix: alpha of cutmix (arXiv:1905.04899); 0 is off. With both, each has probability 1/2.
      group: images mixed among themselves; 0 is the whole batch.
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
          images: normalized, float32 (images, height, width, channels).
          targets: class probabilities per image, float32 (images, classes).

        Raises:
          ValueError: the group size does not divide the batch size.
        """
        count, height, width, _ = images.shape
        group = self.group or count
        if count % group:
            raise ValueError(
                f"config.augment.mix_group={group} does not divide a batch of {count} images; "
                "0 mixes over the whole batch"
            )
        keys = image_keys(stage_key(key, Stage.MIX), count // group)
        masks, kept = jax.vmap(lambda one: self.weights(one, height, width))(keys)

        def mix(values: jax.Array, weight: jax.Array) -> jax.Array:
            grouped = values.reshape(count // group, group, *values.shape[1:])
            return (grouped * weight + grouped[:, ::-1] * (1 - weight)).reshape(values.shape)

        return mix(images, masks[:, None, :, :, None]), mix(targets, kept[:, None, None])

    def weights(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """The weights of a group's own pixels and of its own targets.

        The first is constant for mixup; for cutmix it is 0 in a rectangle and 1 around it.

        Returns:
          float32 (height, width) and ().
        """
        choice_key, weight_key, rectangle_key = jax.random.split(key, 3)
        pixels, kept = jnp.ones((height, width)), jnp.ones(())
        if self.mixup:
            kept = jax.random.beta(weight_key, self.mixup, self.mixup)
            pixels = jnp.full((height, width), kept)
        if self.cutmix:
            outside = self._outside(rectangle_key, height, width)
            cut = jax.random.bernoulli(choice_key) if self.mixup else jnp.array(True)
            pixels = jnp.where(cut, outside, pixels)
            # Counted in integers: a float32 mean would depend on the order of its sum.
            kept = jnp.where(cut, outside.sum() / (height * width), kept)
        return pixels, kept

    def _outside(self, key: jax.Array, height: int, width: int) -> jax.Array:
        """Complement of a rectangle of the image's aspect ratio, clipped at its edges: bool."""
        size_key, row_key, column_key = jax.random.split(key, 3)
        side = jnp.sqrt(1 - jax.random.beta(size_key, self.cutmix, self.cutmix))

        def covered(key: jax.Array, size: int) -> jax.Array:
            half = jnp.floor(size * side).astype(jnp.int32) // 2
            center = jax.random.randint(key, (), 0, size)
            index = jnp.arange(size)
            return (index >= center - half) & (index < center + half)

        return ~(covered(row_key, height)[:, None] & covered(column_key, width)[None, :])


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """uint8 images as the source gives them -> normalized float32 images.

    In the order of timm's and RepVGG's recipes: flip, policy and color jitter on integers 0 …
    255, then affine changes on the same scale, normalization, and erasing. `None` and 0 leave a
    stage out of the program; without any, images are bitwise those of `normalize`.

    Attributes:
      normalize: as in evaluation.
      flip: probability of a horizontal flip.
      policy: AutoAugment, RandAugment or raug15.
      fill: value of each channel, 0 … 255, where the policy moves an image away.
      jitter: color jitter.
      affine: small affine changes.
      erase: random erasing.
    """

    normalize: Normalize
    flip: float = 0.0
    policy: Policy | None = None
    fill: tuple[int, ...] = (128, 128, 128)
    jitter: ColorJitter | None = None
    affine: RandomAffine | None = None
    erase: RandomErasing | None = None

    def __call__(self, key: jax.Array, images: jax.Array | np.ndarray) -> jax.Array:
        """Augments and normalizes.

        What happens to an image depends on `key` and its index in the batch only.

        Args:
          key: of the step.
          images: uint8 (images, height, width, channels).

        Returns:
          float32 of the same shape.
        """
        pixels = self.augment_uint8(key, images)
        if self.affine:
            pixels = self.affine(key, pixels.astype(jnp.float32))
        pixels = self.normalize(pixels)
        if self.erase:
            pixels = self.erase(stage_key(key, Stage.ERASE), pixels)
        return pixels

    def augment_uint8(self, key: jax.Array, images: jax.Array | np.ndarray) -> jax.Array:
        """The stages on uint8 images; uint8."""
        images = jnp.asarray(images)
        count = images.shape[0]
        if self.flip:
            keys = image_keys(stage_key(key, Stage.FLIP), count)
            flipped = jax.vmap(jax.random.uniform)(keys) < self.flip
            images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
        if self.policy:
            images = apply_in_turn(
                images,
                jax.vmap(self.policy.sample)(image_keys(stage_key(key, Stage.POLICY), count)),
                possible=self.policy.possible,
                fill=self.fill,
                resampling=self.policy.resampling,
            )
        if self.jitter:
            images = apply_in_turn(
                images,
                jax.vmap(self.jitter.sample)(image_keys(stage_key(key, Stage.JITTER), count)),
                possible=self.jitter.possible,
            )
        return images


def make_augmentation(settings: AugmentSettings, normalize: Normalize) -> Augmentation:
    """The augmentation that `config.augment` describes, without mixing.

    Args:
      settings: `config.augment`.
      normalize: as in evaluation, with one mean per channel of the images.

    Raises:
      ValueError: operations on colors for images of other than three channels.
    """
    channels = len(normalize.mean)
    jitter, affine, erase = settings.jitter, settings.affine, settings.erase
    color_jitter = ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    random_affine = RandomAffine(affine.rotation, affine.scale, affine.shear, affine.shift)
    made = Augmentation(
        normalize=normalize,
        flip=float(settings.flip),
        policy=_policy(settings),
        # timm moves images away from their mean color, RepVGG's code from middle gray.
        fill=(128,) * channels
        if settings.policy == "raug15"
        else tuple(min(255, round(255 * mean)) for mean in normalize.mean),
        jitter=color_jitter if color_jitter.possible else None,
        affine=random_affine if random_affine != RandomAffine() else None,
        erase=RandomErasing(
            erase.probability, erase.mode, erase.least_area, erase.most_area, erase.least_aspect
        )
        if erase.probability
        else None,
    )
    for name, stage in (
        (f"policy={settings.policy!r}", made.policy),
        ("jitter.saturation or jitter.hue", made.jitter),
    ):
        if stage and stage.possible & RGB_OPS and channels != 3:
            raise ValueError(
                f"config.augment.{name} changes colors, which needs images of 3 channels; "
                f"these have {channels}"
            )
    return made


def make_mixing(settings: AugmentSettings) -> Mixing | None:
    """Mixup and cutmix of `config.augment`; None if both are off."""
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixing(settings.mixup, settings.cutmix, settings.mix_group)


def _policy(settings: AugmentSettings) -> Policy | None:
    if settings.policy == "autoaugment":
        return AutoAugment(resampling=settings.resampling)
    if settings.policy == "randaugment":
        rand = settings.randaugment
        return RandAugment(
            rand.ops,
            rand.magnitude,
            rand.deviation,
            rand.increasing,
            rand.probability,
            settings.resampling,
        )
    return Raug15() if settings.policy == "raug15" else None


ERASE_ATTEMPTS = 10  # at a rectangle that fits into the image, as in timm
