"""Augmentation on the device, inside the compiled step: `docs/augmentation.md`."""

from repvgg_jax.data.augment.affine import RandomAffine
from repvgg_jax.data.augment.composition import (
    Augmentation,
    make_augmentation,
    make_mixing,
)
from repvgg_jax.data.augment.mixing import Mixing
from repvgg_jax.data.augment.normalise import Normalise

__all__ = [
    "Augmentation",
    "Mixing",
    "Normalise",
    "RandomAffine",
    "make_augmentation",
    "make_mixing",
]
