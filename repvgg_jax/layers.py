"""Layers that blocks consist of: batch normalization, squeeze-and-excite, a scale per channel.

Why not `nn.BatchNorm`: the published weights come from PyTorch, whose running variance is the
unbiased one (Flax keeps the biased one), and the number of images that share statistics must be
a stated choice. Under plain `jit` it would be the whole batch, on any number of devices; the
paper used 32 images.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.activations import ACTIVATIONS as ACTIVATIONS
from repvgg_jax.activations import gelu as gelu
from repvgg_jax.batch_stats import (
    AxisName,
    image_groups,
    moments,
    per_image,
    updated_running,
    values_per_channel,
)
from repvgg_jax.meshes import on_auto_axes
from repvgg_jax.reparam import EPSILON
from repvgg_jax.text import named_leaves

torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for convolutions and linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""


def _identity_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A kernel (height, width, in_channels / groups, out_channels) that returns its input."""
    height, width, per_group, out_channels = shape
    out = jnp.arange(out_channels)
    center = (height // 2, width // 2)
    return jnp.zeros(shape, dtype).at[(*center, out % per_group, out)].set(1)


KERNEL_INITIALIZERS = {
    "torch": torch_kernel_init,
    "he": nn.initializers.he_uniform(),
    "zeros": nn.initializers.zeros,
    "identity": _identity_init,
}
"""What `repvgg_jax.reparam.Conv.initial` means."""


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default bias of a layer with that fan-in, from the same interval."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def check_classes(name: str, head: Any, num_classes: int) -> None:
    """Compares a network's number of classes with its classifier's variables.

    Args:
      name: of the network.
      head: parameters of the classifier, a linear layer or a block; empty if there are none.
      num_classes: of the network; 0 takes any.

    Raises:
      ValueError: they are those of another number of classes.
    """
    for path, leaf in named_leaves(nn.meta.unbox(head)).items():
        if path.endswith("kernel") and num_classes and leaf.shape[-1] != num_classes:
            raise ValueError(
                f"{name} has num_classes={num_classes}, but was given variables of "
                f"{leaf.shape[-1]} classes; build it with num_classes={leaf.shape[-1]}, or "
                "let merge_weights take all but the classifier from them"
            )


class BatchNorm(nn.Module):
    """Normalizes every channel; running statistics live in `batch_stats`.

    Arithmetic and statistics are float32 (float64 for float64 inputs), for bfloat16 inputs, too,
    and so is the result: the caller rounds after it has summed its branches.

    Attributes:
      momentum: share of the old running statistics that every training step keeps; 0.9 is
        `momentum=0.1` in PyTorch.
      epsilon: added to the variance.
      group_size: images that share statistics in training; None for the whole batch. Running
        statistics take the mean over groups.
      param_dtype: of the affine parameters. Running statistics are in at least float32.
      axis_name: of the devices whose images are one batch, under `jax.shard_map` or `jax.pmap`.
        Under `jax.jit` a sharded batch is one batch anyway.
      initial: value of the scales.
    """

    momentum: float = 0.9
    epsilon: float = EPSILON
    group_size: int | None = None
    param_dtype: jnp.dtype = jnp.float32
    axis_name: AxisName | None = None
    initial: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalizes `x` (images, height, width, channels).

        Args:
          x: feature maps.
          train: use the statistics of `x` and update the running ones (which needs
            `mutable=["batch_stats"]`); otherwise use the running ones.

        Raises:
          ValueError: the groups do not divide the batch, or one value per channel only.
        """
        channels = (x.shape[-1],)
        init = nn.initializers.constant(self.initial)
        scale = self.param("scale", init, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        # In bfloat16 an update by a tenth of a small difference would change nothing.
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, wide)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, wide)

        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not train:
            row = (1, 1, 1, -1)
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            return (x - running_mean.value.reshape(row)) * factor.reshape(row) + bias.reshape(row)

        axis_name = None if self.is_initializing() else self.axis_name
        groups = image_groups(x.shape, self.group_size, axis_name)
        mean, var = on_auto_axes(lambda x: moments(x, groups, axis_name), x)
        if not self.is_initializing():
            running_mean.value, running_var.value = updated_running(
                running_mean.value,
                running_var.value,
                mean,
                var,
                count=values_per_channel(x.shape, groups, axis_name),
                momentum=self.momentum,
            )

        def normalized(x: jax.Array, mean: jax.Array, var: jax.Array, scale, bias) -> jax.Array:
            factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
            # Stop the gradient through the subtracted mean and route it through the bias instead,
            # which saves a pass over `x` in the backward pass.
            center = jax.lax.stop_gradient(mean)
            offset = bias[None] - (mean - center) * factor
            return (x - per_image(x, center)) * per_image(x, factor) + per_image(x, offset)

        return on_auto_axes(normalized, x, mean, var, scale, bias)


class ChannelScale(nn.Module):
    """Multiplies every channel by a parameter of its own.

    Attributes:
      initial: value of the scales.
      param_dtype: of the parameters.
      use_bias: whether a bias is added.
      spread: standard deviation of the initial scales around `initial` and of the biases around 0.
    """

    initial: float = 1.0
    param_dtype: jnp.dtype = jnp.float32
    use_bias: bool = False
    spread: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x` (…, channels)."""
        shape = (x.shape[-1],)
        around = nn.initializers.normal(self.spread) if self.spread else nn.initializers.zeros
        scale = self.param(
            "scale",
            lambda key, shape, dtype: self.initial + around(key, shape, dtype),
            shape,
            self.param_dtype,
        )
        row = (1,) * (x.ndim - 1) + (-1,)
        if not self.use_bias:
            return x * scale.reshape(row)
        bias = self.param("bias", around, shape, self.param_dtype)
        return x * scale.reshape(row) + bias.reshape(row)


class SqueezeExciteGate(nn.Module):
    """Multiplies every channel by a gate in (0, 1) computed from all channels' means.

    Attributes:
      squeezed: width between the two linear layers.
      dtype: of the result.
      param_dtype: of the parameters.
    """

    squeezed: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gates `x` (images, height, width, channels)."""
        channels = x.shape[-1]
        pooled = x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        hidden = nn.relu(self._dense(self.squeezed, channels, "reduce")(pooled))
        gate = nn.sigmoid(self._dense(channels, self.squeezed, "expand")(hidden))
        return x * gate[:, None, None, :].astype(self.dtype)

    def _dense(self, features: int, fan_in: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(fan_in),
            param_dtype=self.param_dtype,
            name=name,
        )


def conv_bn(network: Any, features: int, *, stride: int = 1) -> tuple[nn.Conv, BatchNorm]:
    """A 3x3 convolution and its norm, for the fields `conv` and `bn` of a head for training.

    Args:
      network: a module with fields as `BatchNorm` and `nn.Conv` have them; this is in its `setup`.
      features: channels out.
      stride: of the convolution.
    """
    conv = nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        use_bias=False,
        kernel_init=torch_kernel_init,
        dtype=network.dtype,
        param_dtype=network.param_dtype,
    )
    norm = BatchNorm(
        momentum=network.momentum,
        epsilon=network.epsilon,
        group_size=network.bn_group_size,
        param_dtype=network.param_dtype,
        axis_name=getattr(network, "axis_name", None),
    )
    return conv, norm
