"""Colour jitter: brightness, contrast, saturation and hue by chance, in an order by chance."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.kinds import Choice, Kind


@dataclasses.dataclass(frozen=True)
class Jitter:
    """torchvision's `ColorJitter` on Pillow images.

    Factors are drawn evenly from [max(0, 1 - x), 1 + x], turns of the hue from [-x, x].

    Attributes:
      brightness: 0 or more.
      contrast: 0 or more.
      saturation: 0 or more.
      hue: share of the colour circle, 0 … 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @property
    def _ranges(self) -> dict[Kind, tuple[float, float]]:
        factors = {
            Kind.BRIGHTNESS: self.brightness,
            Kind.CONTRAST: self.contrast,
            Kind.COLOR: self.saturation,
        }
        ranges = {kind: (max(0.0, 1 - x), 1 + x) for kind, x in factors.items() if x}
        return ranges | ({Kind.HUE: (-self.hue, self.hue)} if self.hue else {})

    @property
    def possible(self) -> frozenset[Kind]:
        """Operations that are on."""
        return frozenset(self._ranges)

    def draw(self, key: jax.Array) -> Choice:
        """The operations of one image in turn: fields of shape (operations,)."""
        order, amount = jax.random.split(key)
        least, most = jnp.array(list(self._ranges.values())).T
        arguments = jax.random.uniform(amount, least.shape, minval=least, maxval=most)
        orders = jnp.array(list(itertools.permutations(range(len(self._ranges)))))
        turn = orders[jax.random.randint(order, (), 0, len(orders))]
        unused = jnp.zeros(least.shape)
        return Choice(
            kind=jnp.array(list(self._ranges), jnp.int32)[turn],
            argument=arguments[turn],
            cubic=unused.astype(bool),
            row=unused,
            column=unused,
        )
