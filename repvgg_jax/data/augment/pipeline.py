"""Everything that happens to the images of a batch on the device, in order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.base import Stage, image_keys, stage_key
from repvgg_jax.data.augment.ops import RGB_OPS, apply_in_turn
from repvgg_jax.data.augment.policies import AutoAugment, ColorJitter, Policy, RandAugment, Raug15
from repvgg_jax.data.augment.transforms import Mixing, RandomAffine, RandomErasing
from repvgg_jax.data.settings import AugmentSettings
from repvgg_jax.normalize import Normalize


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
