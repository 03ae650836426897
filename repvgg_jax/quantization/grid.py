"""Integers in place of floats: value = scale * (number - zero point)."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.quantization.settings import Target

_LARGEST_BIAS = 2**30
"""Largest magnitude of an int32 bias: half of what fits, so that sums stay below 2^31."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("scale", "zero_point"),
    meta_fields=("lowest", "highest"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The values that the numbers of an array stand for; a PyTree.

    Attributes:
      scale: of a step, float32 () or, for weights, (channels,).
      zero_point: the number that stands for 0.
      lowest: the smallest number.
      highest: the largest number.
    """

    scale: np.ndarray
    zero_point: int
    lowest: int
    highest: int

    @classmethod
    def of_range(cls, low: float, high: float, target: Target) -> Self:
        """The grid of activations between two values, one at most 0 and one at least 0."""
        if target.symmetric:
            scale = np.float32(max(-low, high) / target.highest)
            return cls(np.maximum(scale, _tiny), 0, target.lowest, target.highest)
        scale = np.maximum(np.float32((high - low) / 255), _tiny)
        zero = target.lowest + int(np.clip(np.round(-low / scale), 0, 255))
        return cls(scale, zero, target.lowest, target.highest)

    @classmethod
    def of_weights(cls, kernel: Any, bias: Any, activation: "Grid") -> Self:
        """The grid of a kernel, symmetric per output channel, for activations on another grid.

        The bias is an int32 of scale `activation.scale * scale`. Where it would not fit, because a
        channel's weights are tiny beside its bias, the steps of the weights are made larger.

        Args:
          kernel: (…, channels out).
          bias: (channels out,).
          activation: of the layer's input.
        """
        largest = np.abs(np.asarray(kernel, np.float64)).reshape(-1, kernel.shape[-1]).max(axis=0)
        for_bias = np.abs(np.asarray(bias, np.float64)) / (float(activation.scale) * _LARGEST_BIAS)
        scale = np.maximum(np.maximum(largest / 127, for_bias), _tiny)
        return cls(scale.astype(np.float32), 0, -127, 127)

    @property
    def dtype(self) -> Any:
        """Type of the numbers, int8 or uint8."""
        return np.uint8 if self.lowest == 0 else np.int8

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value, of activations."""
        scale = float(self.scale)
        return scale * (self.lowest - self.zero_point), scale * (self.highest - self.zero_point)

    def numbers(self, values: Any) -> Any:
        """Values as numbers, floating point; to even at a half, as the runtimes round."""
        xp = np if isinstance(values, np.ndarray) else jnp
        rounded = xp.round(values / self._steps(values)) + self.zero_point
        return xp.clip(rounded, self.lowest, self.highest)

    def __call__(self, values: Any) -> Any:
        """Values as they are after quantization, in float32."""
        return (self.numbers(values) - self.zero_point) * self._steps(values)

    def _steps(self, values: Any) -> Any:
        """The scale, with as many axes as the values, or none."""
        if not self.scale.ndim:
            return self.scale
        return self.scale.reshape((1,) * (values.ndim - 1) + self.scale.shape)


_tiny = np.float32(1e-30)
