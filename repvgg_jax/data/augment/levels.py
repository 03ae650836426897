"""What a level of severity, 0 … 10 and beyond, means to each operation of a policy.

Every rule takes the level and a sign of ±1 and gives the argument of its `Kind`. The scales are
those of AutoAugment (arXiv:1805.09501, table 6) in tenths, in the variants that timm
(`timm/data/auto_augment.py`) and RepVGG's training code (`train/randaug.py`) use.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.kinds import Kind

Rule = Callable[[jax.Array, jax.Array], jax.Array]
"""(level, sign) -> argument, float32 of the same shape."""


def _share(level: jax.Array, most: int, tenths: int = 10) -> jax.Array:
    """`level` tenths of `most`, cut off to an integer."""
    return jnp.floor(level * most / tenths)


def _nothing(level: jax.Array, sign: jax.Array) -> jax.Array:
    return jnp.zeros_like(level)


def _either_way(most: float) -> Rule:
    return lambda level, sign: sign * (level / 10 * most)


def _factor(level: jax.Array, sign: jax.Array) -> jax.Array:
    """0.1 … 1.9: weak levels take away, strong ones add."""
    return level / 10 * 1.8 + 0.1


def _increasing_factor(level: jax.Array, sign: jax.Array) -> jax.Array:
    """1 changes nothing; either way from there with the level, 0.1 at least."""
    return jnp.maximum(1 + sign * (level / 10 * 0.9), 0.1)


_SHARED: dict[Kind, Rule] = {
    Kind.AUTO_CONTRAST: _nothing,
    Kind.EQUALIZE: _nothing,
    Kind.INVERT: _nothing,
    Kind.ROTATE: _either_way(30.0),
    Kind.POSTERIZE: lambda level, sign: _share(level, 4),
    Kind.SOLARIZE: lambda level, sign: _share(level, 256),
    Kind.SOLARIZE_ADD: lambda level, sign: _share(level, 110),
    Kind.COLOR: _factor,
    Kind.CONTRAST: _factor,
    Kind.BRIGHTNESS: _factor,
    Kind.SHARPNESS: _factor,
    Kind.SHEAR_X: _either_way(0.3),
    Kind.SHEAR_Y: _either_way(0.3),
    Kind.TRANSLATE_X: _either_way(0.45),
    Kind.TRANSLATE_Y: _either_way(0.45),
}

RANDAUGMENT: Mapping[Kind, Rule] = MappingProxyType(_SHARED)
"""timm's 15 operations, `inc0`: posterize, solarize and factors as EfficientNet's code has them."""

RANDAUGMENT_INCREASING: Mapping[Kind, Rule] = MappingProxyType(
    _SHARED
    | {
        Kind.POSTERIZE: lambda level, sign: 4 - _share(level, 4),
        Kind.SOLARIZE: lambda level, sign: 256 - _share(level, 256),
        Kind.COLOR: _increasing_factor,
        Kind.CONTRAST: _increasing_factor,
        Kind.BRIGHTNESS: _increasing_factor,
        Kind.SHARPNESS: _increasing_factor,
    }
)
"""timm's 15 operations, `inc1`: a higher level always changes more."""

AUTOAUGMENT: Mapping[Kind, Rule] = MappingProxyType(
    _SHARED | {Kind.POSTERIZE: lambda level, sign: 4 + _share(level, 4)}
)
"""The paper's scales: 4 … 8 bits, more with the level."""

RAUG15: Mapping[Kind, Rule] = MappingProxyType(
    _SHARED | {Kind.CUTOUT: lambda level, sign: jnp.maximum(level / 10 * 40, 2)}
)
"""RepVGG's 16 operations. At level 0 … 2 its posterize keeps no bit: the image is black."""


def arguments_of(rules: Mapping[Kind, Rule], levels: jax.Array) -> jax.Array:
    """A table of arguments: float32 (kinds, levels, 2), the last axis for the signs -1 and 1."""
    level, sign = jnp.broadcast_arrays(
        levels.astype(jnp.float32)[:, None], jnp.array([[-1.0, 1.0]])
    )
    return jnp.stack([rule(level, sign) for rule in rules.values()])
