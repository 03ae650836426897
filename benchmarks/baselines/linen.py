"""Networks as Flax modules: every convolution with its norm is a `ReparamBlock` of one branch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from baselines.network import (
    Affine,
    Average,
    Conv,
    Dense,
    Flatten,
    Gate,
    MaxPool,
    Network,
    Sum,
    evaluate,
)
from repvgg_jax import ReparamBlock, cpu_conv, fuse_params
from repvgg_jax.cpu_conv import Lowering
from repvgg_jax.layers import torch_bias_init, torch_kernel_init

ACTIVATIONS: dict[str | None, Callable[[Any], Any]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    None: lambda x: x,
}


class Baseline(nn.Module):
    """A network from its parts, without dropout.

    Attributes:
      network: what to build.
      deploy: the folded form, whose variables come from `fuse`.
      lowering: as in `create_model`.
      dtype: of the convolutions; the last linear layer computes in float32.
      param_dtype: of the parameters.
    """

    network: Network
    deploy: bool = False
    lowering: Lowering = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (images, classes) of normalized images (images, height, width, channels)."""
        layers = _Layers(self, train)
        return evaluate(self.network.parts, images.astype(self.dtype), layers)

    def fuse(self, variables: Any) -> Any:
        """The variables of `self.clone(deploy=True)`, batch normalization folded."""
        normed = [conv for conv in self.network.convs() if conv.norm]
        if not normed:
            return {"params": variables["params"]}
        specs = tuple({conv.spec: None for conv in normed})
        return fuse_params(variables, blocks=specs, expect=len(normed))


class _Layers:
    """What the parts compute; the layers become children of the module."""

    def __init__(self, module: Baseline, train: bool):
        self.module = module
        self.train = train

    def conv(self, part: Conv, x: jax.Array) -> jax.Array:
        module = self.module
        if part.norm:
            block = ReparamBlock(
                part.features,
                stride=part.stride,
                groups=part.groups,
                deploy=module.deploy,
                lowering=module.lowering,
                dtype=module.dtype,
                param_dtype=module.param_dtype,
                activation=ACTIVATIONS[part.activation],
                spec=part.spec,
                name=part.name,
            )
            return block(x, self.train)
        auto = module.lowering == "auto"
        conv = nn.Conv(
            part.features,
            (part.size, part.size),
            strides=part.stride,
            padding=((part.size // 2,) * 2,) * 2,
            feature_group_count=part.groups,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(part.size**2 * x.shape[-1] // part.groups),
            dtype=module.dtype,
            param_dtype=module.param_dtype,
            conv_general_dilated=cpu_conv.conv_general_dilated if auto else None,
            name=part.name,
        )
        return ACTIVATIONS[part.activation](conv(x))

    def affine(self, part: Affine, x: jax.Array) -> jax.Array:
        return _Affine(self.module.dtype, self.module.param_dtype, name=part.name)(x)

    def max_pool(self, part: MaxPool, x: jax.Array) -> jax.Array:
        padding = ((part.padding,) * 2,) * 2
        return nn.max_pool(x, (part.size,) * 2, (part.stride,) * 2, padding)

    def gate(self, part: Gate, x: jax.Array) -> jax.Array:
        y = self.average(Average(), x)
        y = self._linear(f"{part.name}_reduce", part.squeezed, y)
        y = ACTIVATIONS[part.activation](y)
        y = nn.sigmoid(self._linear(f"{part.name}_expand", x.shape[-1], y))
        return x * y[:, None, None, :].astype(x.dtype)

    def add(self, part: Sum, terms: list[jax.Array]) -> jax.Array:
        return ACTIVATIONS[part.activation](sum(terms[1:], terms[0]))

    def average(self, _: Average, x: jax.Array) -> jax.Array:
        return x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))

    def flatten(self, _: Flatten, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)

    def dense(self, part: Dense, x: jax.Array) -> jax.Array:
        dtype = self.module.dtype if part.activation else None
        return ACTIVATIONS[part.activation](self._linear(part.name, part.features, x, dtype))

    def _linear(self, name: str, features: int, x: jax.Array, dtype: Any = None) -> jax.Array:
        layer = nn.Dense(
            features,
            dtype=dtype or jnp.promote_types(self.module.dtype, jnp.float32),
            param_dtype=self.module.param_dtype,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(x.shape[-1]),
            name=name,
        )
        return layer(x)


class _Affine(nn.Module):
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        row = (1, 1, 1, -1)
        return x * scale.astype(self.dtype).reshape(row) + bias.astype(self.dtype).reshape(row)
