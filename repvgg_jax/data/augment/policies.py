"""Named policies: which operations an image gets, and how much of each."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment import levels
from repvgg_jax.data.augment.autoaugment import IMAGENET, SubPolicy
from repvgg_jax.data.augment.kinds import Choice, Kind


class Policy(Protocol):
    """Draws the operations of one image."""

    @property
    def resampling(self) -> str:
        """Of geometric operations, see `warp`."""

    @property
    def possible(self) -> frozenset[Kind]:
        """Operations that can occur."""

    def draw(self, key: jax.Array) -> Choice:
        """The operations of one image in turn: fields of shape (operations,)."""


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment: some of 15 operations, drawn evenly and with replacement.

    `rand-m9-mstd0.5-inc1` is the default. Source: `timm/data/auto_augment.py`; the idea is
    arXiv:1909.13719.

    Attributes:
      ops: operations an image (`n`).
      magnitude: mean level (`m`), on a scale of 0 … 10.
      deviation: standard deviation of the level (`mstd`); the level stays within 0 … 10.
      increasing: a higher level always changes more (`inc1`).
      probability: that a drawn operation is applied (`p`).
      resampling: see `warp`.
    """

    ops: int = 2
    magnitude: float = 9.0
    deviation: float = 0.5
    increasing: bool = True
    probability: float = 0.5
    resampling: str = "bilinear"

    @property
    def possible(self) -> frozenset[Kind]:
        """The 15 operations of timm."""
        return frozenset(levels.RANDAUGMENT)

    def draw(self, key: jax.Array) -> Choice:
        """See `Policy`."""
        which, strength, way, whether, rest = jax.random.split(key, 5)
        rules = levels.RANDAUGMENT_INCREASING if self.increasing else levels.RANDAUGMENT
        shape = (self.ops,)
        drawn = jax.random.randint(which, shape, 0, len(rules))
        noise = self.deviation * jax.random.normal(strength, shape)
        level = jnp.clip(self.magnitude + noise, 0, 10)
        sign = jax.random.rademacher(way, shape, jnp.float32)
        arguments = jnp.stack([rule(level, sign) for rule in rules.values()])
        applied = jax.random.uniform(whether, shape) < self.probability
        kinds = jnp.array(list(rules), jnp.int32)[drawn]
        argument = jnp.take_along_axis(arguments, drawn[None, :], axis=0)[0]
        return _choice(rest, jnp.where(applied, kinds, Kind.IDENTITY), argument)


@dataclasses.dataclass(frozen=True)
class Raug15:
    """RepVGG's `raug15`: two of 16 operations, always applied, each at a level of 0 … 14.

    Source: `RandAugPolicy(magnitude=15)` in `train/randaug.py` of the RepVGG repository. Levels
    are integers, drawn evenly; 10 is the strongest of AutoAugment's scale, so these go beyond it.

    Attributes:
      resampling: bilinear or bicubic by chance, as there.
    """

    resampling: str = "random"

    @property
    def possible(self) -> frozenset[Kind]:
        """RepVGG's 16 operations."""
        return frozenset(levels.RAUG15)

    def draw(self, key: jax.Array) -> Choice:
        """See `Policy`."""
        which, strength, way, rest = jax.random.split(key, 4)
        drawn = jax.random.randint(which, (2,), 0, len(levels.RAUG15))
        level = jax.random.randint(strength, (2,), 0, 15)
        sign = jax.random.bernoulli(way, shape=(2,)).astype(jnp.int32)
        kinds = jnp.array(list(levels.RAUG15), jnp.int32)[drawn]
        arguments = levels.arguments_of(levels.RAUG15, jnp.arange(15))
        return _choice(rest, kinds, arguments[drawn, level, sign])


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """One of several pairs of operations, drawn evenly; each has its own probability and level.

    Source: arXiv:1805.09501; levels mean what timm's `original` makes of them.

    Attributes:
      sub_policies: pairs of (operation, probability, level).
      resampling: see `warp`.
    """

    sub_policies: tuple[SubPolicy, ...] = IMAGENET
    resampling: str = "bilinear"

    @property
    def possible(self) -> frozenset[Kind]:
        """Operations of the sub-policies."""
        return frozenset(kind for pair in self.sub_policies for kind, _, _ in pair)

    def draw(self, key: jax.Array) -> Choice:
        """See `Policy`."""
        which, way, whether, rest = jax.random.split(key, 4)
        rules = list(levels.AUTOAUGMENT)
        kinds, chances, strengths = (
            jnp.array([[entry[column] for entry in pair] for pair in self.sub_policies])
            for column in range(3)
        )
        rows = jnp.array([[rules.index(kind) for kind, _, _ in p] for p in self.sub_policies])
        arguments = levels.arguments_of(levels.AUTOAUGMENT, jnp.arange(11))
        drawn = jax.random.randint(which, (), 0, len(self.sub_policies))
        sign = jax.random.bernoulli(way, shape=(2,)).astype(jnp.int32)
        applied = jax.random.uniform(whether, (2,)) < chances[drawn]
        return _choice(
            rest,
            jnp.where(applied, kinds[drawn], Kind.IDENTITY),
            arguments[rows[drawn], strengths[drawn], sign],
        )


def _choice(key: jax.Array, kind: jax.Array, argument: jax.Array) -> Choice:
    cubic, row, column = jax.random.split(key, 3)
    return Choice(
        kind=kind.astype(jnp.int32),
        argument=argument,
        cubic=jax.random.bernoulli(cubic, shape=kind.shape),
        row=jax.random.uniform(row, kind.shape),
        column=jax.random.uniform(column, kind.shape),
    )
