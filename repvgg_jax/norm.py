"""Batch normalisation with PyTorch's exact arithmetic, on named groups of images.

Why not `nn.BatchNorm`: the published weights come from PyTorch, whose running variance is
the unbiased one (Flax keeps the biased one), and the size of the group of images that
shares statistics must be a stated choice. Under plain `jit` they would be global over
the batch, whatever the number of devices; the paper used 32 images.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class BatchNorm(nn.Module):
    """Normalises every channel; running statistics live in `batch_stats`.

    Arithmetic and statistics are float32 (float64 for float64 inputs), also for bfloat16
    inputs, and so is the result: the caller rounds after it has summed its branches.

    Attributes:
      momentum: the share of the old running statistics that every training step keeps;
        0.9 is PyTorch's `momentum=0.1`.
      epsilon: added to the variance.
      group_size: images that share statistics in training; None means the whole batch.
        Running statistics take the mean over groups.
      param_dtype: of the affine parameters and the running statistics.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    group_size: int | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises `x` (images, height, width, channels).

        Args:
          x: feature maps.
          train: use the statistics of `x` and update the running ones (which needs
            `mutable=["batch_stats"]`); otherwise use the running ones.

        Raises:
          ValueError: the groups do not divide the batch, or one value per channel only.
        """
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)

        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not train:
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            return (x - _row(running_mean.value)) * _row(factor) + _row(bias)

        groups = x.reshape(image_groups(x.shape, self.group_size), -1, *channels)
        count = groups.shape[1]
        mean = groups.mean(axis=1, keepdims=True)
        var = jnp.square(groups - mean).mean(axis=1, keepdims=True)
        if not self.is_initializing():
            running_mean.value = updated(running_mean.value, mean, self.momentum)
            unbiased = var * (count / (count - 1))
            running_var.value = updated(running_var.value, unbiased, self.momentum)
        factor = jax.lax.rsqrt(var + self.epsilon) * scale[None, None]
        normalised = (groups - mean) * factor + bias[None, None]
        return normalised.reshape(x.shape)


def image_groups(shape: tuple[int, ...], size: int | None) -> int:
    """How many groups of `size` images (None for all) share statistics in a batch.

    Args:
      shape: of the feature maps that are normalised, (images, height, width, channels).
      size: images in a group.

    Raises:
      ValueError: the groups do not divide the batch, or have one value per channel only.
    """
    images, height, width, _ = shape
    size = size or images
    if images % size:
        raise ValueError(
            f"batch normalisation groups of {size} images do not divide "
            f"a batch of {images}; the batch must be a multiple of the group"
        )
    if size * height * width == 1:
        raise ValueError(
            "batch normalisation in training needs more than one value per channel, "
            f"got feature maps of shape {shape}; use larger images or a larger batch"
        )
    return images // size


def updated(running: jax.Array, batch: jax.Array, momentum: float) -> jax.Array:
    """A running statistic (channels,) after a batch; the mean over its groups (…, channels)."""
    batch = batch.reshape(-1, batch.shape[-1]).mean(axis=0).astype(running.dtype)
    return momentum * running + (1 - momentum) * batch


def _row(per_channel: jax.Array) -> jax.Array:
    """Gives a (channels,) vector the rank of feature maps."""
    return per_channel.reshape(1, 1, 1, -1)
