"""Batch normalization with PyTorch's exact arithmetic, over stated groups of images.

Why not `nn.BatchNorm`: the published weights come from PyTorch, whose running variance is the
unbiased one (Flax keeps the biased one), and the number of images that share statistics must be
a stated choice. Under plain `jit` it would be the whole batch, on any number of devices; the
paper used 32 images.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.batch_stats import image_groups, moments, per_image, updated_running
from repvgg_jax.reparam import EPSILON


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
      param_dtype: of the affine parameters and the running statistics.
    """

    momentum: float = 0.9
    epsilon: float = EPSILON
    group_size: int | None = None
    param_dtype: jnp.dtype = jnp.float32

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
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)

        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not train:
            row = (1, 1, 1, -1)
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            return (x - running_mean.value.reshape(row)) * factor.reshape(row) + bias.reshape(row)

        groups = image_groups(x.shape, self.group_size)
        mean, var = moments(x, groups)
        if not self.is_initializing():
            running_mean.value, running_var.value = updated_running(
                running_mean.value,
                running_var.value,
                mean,
                var,
                count=x[..., 0].size // groups,
                momentum=self.momentum,
            )
        factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
        # Stop the gradient through the subtracted mean and route it through the bias instead,
        # which saves a pass over `x` in the backward pass.
        center = jax.lax.stop_gradient(mean)
        offset = bias[None] - (mean - center) * factor
        return (x - per_image(x, center)) * per_image(x, factor) + per_image(x, offset)
