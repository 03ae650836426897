"""Augmentation on the device, inside the compiled step: `docs/augmentation.md`."""

from repvgg_jax.data.augment.pipeline import (
    Augmentation,
    Mixing,
    RandomAffine,
    RandomErasing,
    make_augmentation,
    make_mixing,
)

__all__ = [
    "Augmentation",
    "Mixing",
    "RandomAffine",
    "RandomErasing",
    "make_augmentation",
    "make_mixing",
]
