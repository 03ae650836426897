"""All that happens to the images of a batch on the device, in order."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data.augment.affine import RandomAffine
from repvgg_jax.data.augment.erasing import MODES, Erasing
from repvgg_jax.data.augment.geometry import RESAMPLINGS
from repvgg_jax.data.augment.jitter import Jitter
from repvgg_jax.data.augment.keys import Stage, image_keys, stage_key
from repvgg_jax.data.augment.mixing import Mixing
from repvgg_jax.data.augment.normalise import Normalise
from repvgg_jax.data.augment.operation import COLOUR_KINDS, operate_in_turn
from repvgg_jax.data.augment.policies import AutoAugment, Policy, RandAugment, Raug15

POLICIES = ("none", "autoaugment", "randaugment", "raug15")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """uint8 images as the source gives them -> normalised float32 images.

    In the order of timm's and RepVGG's recipes: flip, policy and colour jitter on integers 0 …
    255, then affine changes, normalising, and erasing. `None` and 0 leave a stage out of the
    program; without any this is `normalise`.

    Attributes:
      normalise: pixels to what the network takes.
      flip: probability of a mirror image.
      policy: AutoAugment, RandAugment or raug15.
      fill: of each channel 0 … 255, where the policy moves an image away.
      jitter: colour jitter.
      affine: small affine changes.
      erase: random erasing.
    """

    normalise: Normalise
    flip: float = 0.0
    policy: Policy | None = None
    fill: tuple[int, ...] = (128, 128, 128)
    jitter: Jitter | None = None
    affine: RandomAffine | None = None
    erase: Erasing | None = None

    def __call__(self, key: jax.Array, images: jax.Array | np.ndarray) -> jax.Array:
        """Augments and normalises.

        What happens to an image depends on `key` and its index in the batch only.

        Args:
          key: of the step.
          images: uint8 (images, height, width, channels).

        Returns:
          float32 of the same shape.
        """
        pixels = jnp.asarray(self.integers(key, images), jnp.float32) / 255
        if self.affine:
            pixels = self.affine(key, pixels)
        pixels = self.normalise.standardise(pixels)
        if self.erase:
            pixels = self.erase(stage_key(key, Stage.ERASE), pixels)
        return pixels

    def integers(self, key: jax.Array, images: jax.Array | np.ndarray) -> jax.Array:
        """The stages before normalising, on uint8 images; uint8."""
        images = jnp.asarray(images)
        count = images.shape[0]
        if self.flip:
            keys = image_keys(stage_key(key, Stage.FLIP), count)
            mirrored = jax.vmap(jax.random.uniform)(keys) < self.flip
            images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        if self.policy:
            images = operate_in_turn(
                images,
                jax.vmap(self.policy.draw)(image_keys(stage_key(key, Stage.POLICY), count)),
                possible=self.policy.possible,
                fill=self.fill,
                resampling=self.policy.resampling,
            )
        if self.jitter:
            images = operate_in_turn(
                images,
                jax.vmap(self.jitter.draw)(image_keys(stage_key(key, Stage.JITTER), count)),
                possible=self.jitter.possible,
            )
        return images


def make_augmentation(settings: Mapping[str, Any], normalise: Normalise) -> Augmentation:
    """What `config.augment` describes, but for mixing.

    Args:
      settings: `config.augment`.
      normalise: pixels to what the network takes; its channels are the images'.

    Raises:
      ValueError: a setting that cannot be, or colour operations on images without colour.
    """
    _check(settings)
    channels = len(normalise.mean)
    jitter = Jitter(**settings["jitter"])
    affine = RandomAffine(**settings["affine"])
    erase = Erasing(**settings["erase"])
    made = Augmentation(
        normalise=normalise,
        flip=float(settings["flip"]),
        policy=_policy(settings),
        # timm moves images away from their mean colour, RepVGG's code from middle grey.
        fill=(128,) * channels
        if settings["policy"] == "raug15"
        else tuple(min(255, round(255 * mean)) for mean in normalise.mean),
        jitter=jitter if jitter.possible else None,
        affine=affine if affine != RandomAffine() else None,
        erase=erase if erase.probability else None,
    )
    for name, part in (
        (f"policy={settings['policy']!r}", made.policy),
        ("jitter.saturation or jitter.hue", made.jitter),
    ):
        if part and part.possible & COLOUR_KINDS and channels != 3:
            raise ValueError(
                f"config.augment.{name} changes colours, which takes images of 3 channels; "
                f"these have {channels}"
            )
    return made


def make_mixing(settings: Mapping[str, Any]) -> Mixing | None:
    """Mixup and cutmix of `config.augment`; None when both are off.

    Raises:
      ValueError: a setting that cannot be.
    """
    _check(settings)
    if not settings["mixup"] and not settings["cutmix"]:
        return None
    return Mixing(settings["mixup"], settings["cutmix"], settings["mix_group"])


def _policy(settings: Mapping[str, Any]) -> Policy | None:
    name, resampling = settings["policy"], settings["resampling"]
    if name == "autoaugment":
        return AutoAugment(resampling=resampling)
    if name == "randaugment":
        return RandAugment(**settings["randaugment"], resampling=resampling)
    return Raug15() if name == "raug15" else None


_RANGES: Mapping[str, tuple[float, float]] = {
    "flip": (0, 1),
    "randaugment.ops": (1, 16),
    "randaugment.magnitude": (0, 10),
    "randaugment.deviation": (0, float("inf")),
    "randaugment.probability": (0, 1),
    "jitter.brightness": (0, float("inf")),
    "jitter.contrast": (0, float("inf")),
    "jitter.saturation": (0, float("inf")),
    "jitter.hue": (0, 0.5),
    "erase.probability": (0, 1),
    "erase.least_area": (0, 1),
    "erase.most_area": (0, 1),
    "mixup": (0, float("inf")),
    "cutmix": (0, float("inf")),
    "mix_group": (0, float("inf")),
}
_NAMES = {"policy": POLICIES, "resampling": RESAMPLINGS, "erase.mode": MODES}


def _check(settings: Mapping[str, Any]) -> None:
    def value_of(name: str) -> Any:
        section, _, setting = name.rpartition(".")
        return settings[section][setting] if section else settings[setting]

    for name, allowed in _NAMES.items():
        if value_of(name) not in allowed:
            raise ValueError(
                f"config.augment.{name}={value_of(name)!r}; there are: {', '.join(allowed)}"
            )
    for name, (least, most) in _RANGES.items():
        if not least <= value_of(name) <= most:
            right = f"{least} or more" if most == float("inf") else f"from {least} to {most}"
            raise ValueError(f"config.augment.{name}={value_of(name)} must be {right}")
    least, most = settings["erase"]["least_area"], settings["erase"]["most_area"]
    if least > most:
        raise ValueError(
            f"config.augment.erase.least_area={least} is more than "
            f"config.augment.erase.most_area={most}"
        )
    aspect = settings["erase"]["least_aspect"]
    if not 0 < aspect <= 1:
        raise ValueError(f"config.augment.erase.least_aspect={aspect} must be above 0, at most 1")
