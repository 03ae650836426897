"""Small layers beside convolutions and norms, with PyTorch's initial values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for convolutions and linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default bias of a layer with that fan-in, from the same interval."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ChannelScale(nn.Module):
    """Multiplies every channel by a parameter of its own.

    Attributes:
      initial: value of the parameters.
      param_dtype: of the parameters.
    """

    initial: float = 1.0
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x` (…, channels)."""
        init = nn.initializers.constant(self.initial)
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class SqueezeExciteGate(nn.Module):
    """Multiplies every channel by a gate in (0, 1) computed from all channels' means.

    Attributes:
      reduction: the squeezed width is `channels // reduction`.
      dtype: of the result.
      param_dtype: of the parameters.
    """

    reduction: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gates `x` (images, height, width, channels)."""
        channels = x.shape[-1]
        squeezed = channels // self.reduction
        if squeezed == 0:
            raise ValueError(
                f"{'/'.join(self.path)}: squeeze-and-excite with reduction {self.reduction} "
                f"leaves nothing of {channels} channels"
            )
        pooled = x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        hidden = nn.relu(self._dense(squeezed, channels, "reduce")(pooled))
        gate = nn.sigmoid(self._dense(channels, squeezed, "expand")(hidden))
        return x * gate[:, None, None, :].astype(self.dtype)

    def _dense(self, features: int, fan_in: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(fan_in),
            param_dtype=self.param_dtype,
            name=name,
        )
