"""Augmentation on the device, inside the compiled step: `docs/augmentation.md`."""

from repvgg_jax.data.augment.pipeline import Augmentation, make_augmentation, make_mixing
from repvgg_jax.data.augment.transforms import Mixing, RandomAffine, RandomErasing

__all__ = [
    "Augmentation",
    "Mixing",
    "RandomAffine",
    "RandomErasing",
    "make_augmentation",
    "make_mixing",
]
