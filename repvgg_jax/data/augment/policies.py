"""Policies: which operations an image gets, and with which magnitude.

A level of severity, 0 … 10 and beyond, is turned into the argument of an `Op` by a rule of the
policy. The scales are those of AutoAugment (arXiv:1805.09501, table 6) in tenths, in the variants
of timm (`timm/data/auto_augment.py`) and of RepVGG's training code (`train/randaug.py`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.base import Op, SampledOps

MagnitudeRule = Callable[[jax.Array, jax.Array], jax.Array]
"""(level, sign ±1) -> argument, float32 of the same shape."""


def _fraction(level: jax.Array, maximum: int) -> jax.Array:
    """`level` tenths of `maximum`, truncated to an integer."""
    return jnp.floor(level * maximum / 10)


def _no_argument(level: jax.Array, sign: jax.Array) -> jax.Array:
    return jnp.zeros_like(level)


def _signed(maximum: float) -> MagnitudeRule:
    return lambda level, sign: sign * (level / 10 * maximum)


def _factor(level: jax.Array, sign: jax.Array) -> jax.Array:
    """0.1 … 1.9: low levels reduce, high levels enhance."""
    return level / 10 * 1.8 + 0.1


def _increasing_factor(level: jax.Array, sign: jax.Array) -> jax.Array:
    """1 ± 0.09 per level, at least 0.1."""
    return jnp.maximum(1 + sign * (level / 10 * 0.9), 0.1)


_SHARED: dict[Op, MagnitudeRule] = {
    Op.AUTO_CONTRAST: _no_argument,
    Op.EQUALIZE: _no_argument,
    Op.INVERT: _no_argument,
    Op.ROTATE: _signed(30.0),
    Op.POSTERIZE: lambda level, sign: _fraction(level, 4),
    Op.SOLARIZE: lambda level, sign: _fraction(level, 256),
    Op.SOLARIZE_ADD: lambda level, sign: _fraction(level, 110),
    Op.COLOR: _factor,
    Op.CONTRAST: _factor,
    Op.BRIGHTNESS: _factor,
    Op.SHARPNESS: _factor,
    Op.SHEAR_X: _signed(0.3),
    Op.SHEAR_Y: _signed(0.3),
    Op.TRANSLATE_X: _signed(0.45),
    Op.TRANSLATE_Y: _signed(0.45),
}

RANDAUGMENT_RULES: Mapping[Op, MagnitudeRule] = MappingProxyType(_SHARED)
"""timm's 15 operations, `inc0`: posterize, solarize and factors as in EfficientNet's code."""

INCREASING_RULES: Mapping[Op, MagnitudeRule] = MappingProxyType(
    _SHARED
    | {
        Op.POSTERIZE: lambda level, sign: 4 - _fraction(level, 4),
        Op.SOLARIZE: lambda level, sign: 256 - _fraction(level, 256),
        Op.COLOR: _increasing_factor,
        Op.CONTRAST: _increasing_factor,
        Op.BRIGHTNESS: _increasing_factor,
        Op.SHARPNESS: _increasing_factor,
    }
)
"""timm's 15 operations, `inc1`: a higher level always changes more."""

AUTOAUGMENT_RULES: Mapping[Op, MagnitudeRule] = MappingProxyType(
    _SHARED | {Op.POSTERIZE: lambda level, sign: 4 + _fraction(level, 4)}
)
"""The paper's scales: 4 … 8 bits, more with the level."""

RAUG15_RULES: Mapping[Op, MagnitudeRule] = MappingProxyType(
    _SHARED | {Op.CUTOUT: lambda level, sign: jnp.maximum(level / 10 * 40, 2)}
)
"""RepVGG's 16 operations. At levels 0 … 2 its posterize keeps no bit: the image is black."""


def argument_table(rules: Mapping[Op, MagnitudeRule], levels: jax.Array) -> jax.Array:
    """Arguments by operation, level and sign: float32 (ops, levels, 2), signs -1 and 1."""
    level, sign = jnp.broadcast_arrays(
        levels.astype(jnp.float32)[:, None], jnp.array([[-1.0, 1.0]])
    )
    return jnp.stack([rule(level, sign) for rule in rules.values()])


class Policy(Protocol):
    """Samples the operations of one image."""

    @property
    def resampling(self) -> str:
        """Resampling of geometric operations, see `warp`."""

    @property
    def possible(self) -> frozenset[Op]:
        """Operations that can occur."""

    def sample(self, key: jax.Array) -> SampledOps:
        """The operations of one image, to be applied in turn: fields of shape (operations,)."""


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment: `ops` of 15 operations, uniformly and with replacement.

    The default is `rand-m9-mstd0.5-inc1`. Source: `timm/data/auto_augment.py`, after
    arXiv:1909.13719.

    Attributes:
      ops: operations per image (`n`).
      magnitude: mean level (`m`), on a scale of 0 … 10.
      deviation: standard deviation of the level (`mstd`); the level is clipped to 0 … 10.
      increasing: whether a higher level always changes more (`inc1`).
      probability: that a sampled operation is applied (`p`).
      resampling: see `warp`.
    """

    ops: int = 2
    magnitude: float = 9.0
    deviation: float = 0.5
    increasing: bool = True
    probability: float = 0.5
    resampling: str = "bilinear"

    @property
    def possible(self) -> frozenset[Op]:
        """The 15 operations of timm."""
        return frozenset(RANDAUGMENT_RULES)

    def sample(self, key: jax.Array) -> SampledOps:
        """See `Policy`."""
        op_key, level_key, sign_key, apply_key, rest = jax.random.split(key, 5)
        rules = INCREASING_RULES if self.increasing else RANDAUGMENT_RULES
        shape = (self.ops,)
        index = jax.random.randint(op_key, shape, 0, len(rules))
        noise = self.deviation * jax.random.normal(level_key, shape)
        level = jnp.clip(self.magnitude + noise, 0, 10)
        sign = jax.random.rademacher(sign_key, shape, jnp.float32)
        arguments = jnp.stack([rule(level, sign) for rule in rules.values()])
        applied = jax.random.uniform(apply_key, shape) < self.probability
        ops = jnp.array(list(rules), jnp.int32)[index]
        argument = jnp.take_along_axis(arguments, index[None, :], axis=0)[0]
        return _sampled(rest, jnp.where(applied, ops, Op.IDENTITY), argument)


@dataclasses.dataclass(frozen=True)
class Raug15:
    """RepVGG's `raug15`: two of 16 operations, always applied, each at a level of 0 … 14.

    Source: `RandAugPolicy(magnitude=15)` in `train/randaug.py` of the RepVGG repository. Levels
    are uniform integers; 10 is the strongest of AutoAugment's scale, so these go beyond it.

    Attributes:
      resampling: `random`, as in the source.
    """

    resampling: str = "random"

    @property
    def possible(self) -> frozenset[Op]:
        """RepVGG's 16 operations."""
        return frozenset(RAUG15_RULES)

    def sample(self, key: jax.Array) -> SampledOps:
        """See `Policy`."""
        op_key, level_key, sign_key, rest = jax.random.split(key, 4)
        index = jax.random.randint(op_key, (2,), 0, len(RAUG15_RULES))
        level = jax.random.randint(level_key, (2,), 0, 15)
        sign = jax.random.bernoulli(sign_key, shape=(2,)).astype(jnp.int32)
        ops = jnp.array(list(RAUG15_RULES), jnp.int32)[index]
        arguments = argument_table(RAUG15_RULES, jnp.arange(15))
        return _sampled(rest, ops, arguments[index, level, sign])


SubPolicy = tuple[tuple[Op, float, int], tuple[Op, float, int]]
"""Twice: operation, probability, level of 0 … 10."""

IMAGENET_SUB_POLICIES: tuple[SubPolicy, ...] = (
    ((Op.POSTERIZE, 0.4, 8), (Op.ROTATE, 0.6, 9)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 5)),
    ((Op.EQUALIZE, 0.8, 8), (Op.EQUALIZE, 0.6, 3)),
    ((Op.POSTERIZE, 0.6, 7), (Op.POSTERIZE, 0.6, 6)),
    ((Op.EQUALIZE, 0.4, 7), (Op.SOLARIZE, 0.2, 4)),
    ((Op.EQUALIZE, 0.4, 4), (Op.ROTATE, 0.8, 8)),
    ((Op.SOLARIZE, 0.6, 3), (Op.EQUALIZE, 0.6, 7)),
    ((Op.POSTERIZE, 0.8, 5), (Op.EQUALIZE, 1.0, 2)),
    ((Op.ROTATE, 0.2, 3), (Op.SOLARIZE, 0.6, 8)),
    ((Op.EQUALIZE, 0.6, 8), (Op.POSTERIZE, 0.4, 6)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 0.4, 0)),
    ((Op.ROTATE, 0.4, 9), (Op.EQUALIZE, 0.6, 2)),
    ((Op.EQUALIZE, 0.0, 7), (Op.EQUALIZE, 0.8, 8)),
    ((Op.INVERT, 0.6, 4), (Op.EQUALIZE, 1.0, 8)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 1.0, 2)),
    ((Op.COLOR, 0.8, 8), (Op.SOLARIZE, 0.8, 7)),
    ((Op.SHARPNESS, 0.4, 7), (Op.INVERT, 0.6, 8)),
    ((Op.SHEAR_X, 0.6, 5), (Op.EQUALIZE, 1.0, 9)),
    ((Op.COLOR, 0.4, 0), (Op.EQUALIZE, 0.6, 3)),
    ((Op.EQUALIZE, 0.4, 7), (Op.SOLARIZE, 0.2, 4)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 5)),
    ((Op.INVERT, 0.6, 4), (Op.EQUALIZE, 1.0, 8)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.EQUALIZE, 0.8, 8), (Op.EQUALIZE, 0.6, 3)),
)
"""AutoAugment's policy for ImageNet: arXiv:1805.09501, table 9."""


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """One of several pairs of operations, uniformly; each with its own probability and level.

    Source: arXiv:1805.09501, with the levels of timm's `original`.

    Attributes:
      sub_policies: pairs of (operation, probability, level).
      resampling: see `warp`.
    """

    sub_policies: tuple[SubPolicy, ...] = IMAGENET_SUB_POLICIES
    resampling: str = "bilinear"

    @property
    def possible(self) -> frozenset[Op]:
        """Operations of the sub-policies."""
        return frozenset(op for pair in self.sub_policies for op, _, _ in pair)

    def sample(self, key: jax.Array) -> SampledOps:
        """See `Policy`."""
        pair_key, sign_key, apply_key, rest = jax.random.split(key, 4)
        rules = list(AUTOAUGMENT_RULES)
        ops, probabilities, levels = (
            jnp.array([[entry[column] for entry in pair] for pair in self.sub_policies])
            for column in range(3)
        )
        rows = jnp.array([[rules.index(op) for op, _, _ in p] for p in self.sub_policies])
        arguments = argument_table(AUTOAUGMENT_RULES, jnp.arange(11))
        pair = jax.random.randint(pair_key, (), 0, len(self.sub_policies))
        sign = jax.random.bernoulli(sign_key, shape=(2,)).astype(jnp.int32)
        applied = jax.random.uniform(apply_key, (2,)) < probabilities[pair]
        return _sampled(
            rest,
            jnp.where(applied, ops[pair], Op.IDENTITY),
            arguments[rows[pair], levels[pair], sign],
        )


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """torchvision's `ColorJitter` on Pillow images; a stage of its own, beside any policy.

    Factors are uniform in [max(0, 1 - x), 1 + x], hue shifts in [-x, x], in random order.

    Attributes:
      brightness: 0 or more.
      contrast: 0 or more.
      saturation: 0 or more.
      hue: fraction of the color circle, 0 … 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @property
    def _ranges(self) -> dict[Op, tuple[float, float]]:
        factors = {
            Op.BRIGHTNESS: self.brightness,
            Op.CONTRAST: self.contrast,
            Op.COLOR: self.saturation,
        }
        ranges = {op: (max(0.0, 1 - x), 1 + x) for op, x in factors.items() if x}
        return ranges | ({Op.HUE: (-self.hue, self.hue)} if self.hue else {})

    @property
    def possible(self) -> frozenset[Op]:
        """Operations with a setting above 0."""
        return frozenset(self._ranges)

    def sample(self, key: jax.Array) -> SampledOps:
        """The operations of one image, to be applied in turn: fields of shape (operations,)."""
        order_key, amount_key = jax.random.split(key)
        low, high = jnp.array(list(self._ranges.values())).T
        arguments = jax.random.uniform(amount_key, low.shape, minval=low, maxval=high)
        orders = jnp.array(list(itertools.permutations(range(len(self._ranges)))))
        order = orders[jax.random.randint(order_key, (), 0, len(orders))]
        unused = jnp.zeros(low.shape)
        return SampledOps(
            op=jnp.array(list(self._ranges), jnp.int32)[order],
            argument=arguments[order],
            cubic=unused.astype(bool),
            row=unused,
            column=unused,
        )


def _sampled(key: jax.Array, op: jax.Array, argument: jax.Array) -> SampledOps:
    cubic_key, row_key, column_key = jax.random.split(key, 3)
    return SampledOps(
        op=op.astype(jnp.int32),
        argument=argument,
        cubic=jax.random.bernoulli(cubic_key, shape=op.shape),
        row=jax.random.uniform(row_key, op.shape),
        column=jax.random.uniform(column_key, op.shape),
    )
