"""RepVGG as one would first write it in Flax: `nn.Conv` and `nn.BatchNorm`, three branches.

What the benchmarks compare with. It shares nothing with `repvgg_jax` but the table of
architectures.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.variants import Layer, get_variant


class PlainBlock(nn.Module):
    """Three branches, summed."""

    layer: Layer
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (images, height, width, channels) to the block's output."""
        layer = self.layer

        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                name=name,
            )

        def conv(size: int, name: str) -> nn.Conv:
            pad = layer.dilation * (size // 2)
            return nn.Conv(
                layer.features,
                (size, size),
                strides=layer.stride,
                padding=((pad, pad), (pad, pad)),
                kernel_dilation=layer.dilation if size > 1 else 1,
                feature_group_count=layer.groups,
                use_bias=False,
                dtype=self.dtype,
                name=name,
            )

        y = norm("bn3x3")(conv(3, "conv3x3")(x)) + norm("bn1x1")(conv(1, "conv1x1")(x))
        if layer.identity:
            y += norm("bn_identity")(x)
        return nn.relu(y)


class PlainRepVGG(nn.Module):
    """Blocks, global average, one linear layer; no squeeze-and-excite, no auxiliary heads."""

    variant: str
    num_classes: int = 1000
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Class scores (images, num_classes) in float32."""
        x = images.astype(self.dtype)
        for layer in get_variant(self.variant).layers():
            x = PlainBlock(layer, self.dtype, name=layer.name)(x, train)
        x = x.mean(axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="head")(x)
