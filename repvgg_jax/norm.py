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

        groups = x.reshape(self._groups(x.shape[0]), -1, *x.shape[1:])
        count = groups.shape[1] * groups.shape[2] * groups.shape[3]
        if count == 1:
            raise ValueError(
                "batch normalisation in training needs more than one value per channel, "
                f"got feature maps of shape {x.shape}; use larger images or a larger batch"
            )
        mean = groups.mean(axis=(1, 2, 3), keepdims=True)
        var = jnp.square(groups - mean).mean(axis=(1, 2, 3), keepdims=True)
        if not self.is_initializing():
            unbiased = var * (count / (count - 1))
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                batch = batch.mean(axis=(0, 1, 2, 3)).astype(self.param_dtype)
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
        factor = jax.lax.rsqrt(var + self.epsilon) * scale.reshape(1, 1, 1, 1, -1)
        normalised = (groups - mean) * factor + bias.reshape(1, 1, 1, 1, -1)
        return normalised.reshape(x.shape)

    def _groups(self, images: int) -> int:
        size = self.group_size or images
        if images % size:
            raise ValueError(
                f"batch normalisation groups of {size} images do not divide "
                f"a batch of {images}; the batch must be a multiple of the group"
            )
        return images // size


def _row(per_channel: jax.Array) -> jax.Array:
    """Gives a (channels,) vector the rank of feature maps."""
    return per_channel.reshape(1, 1, 1, -1)
