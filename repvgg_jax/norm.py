"""Batch normalisation with PyTorch's exact arithmetic, on named groups of images.

Why not `nn.BatchNorm`: the published weights come from PyTorch, whose running variance is
the unbiased one (Flax keeps the biased one), and the size of the group of images that
shares statistics must be a stated choice. Under plain `jit` they would be global over
the batch, whatever the number of devices; the paper used 32 images.
"""

import functools
from typing import Any

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
            row = (1, 1, 1, -1)
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            return (x - running_mean.value.reshape(row)) * factor.reshape(row) + bias.reshape(row)

        groups = image_groups(x.shape, self.group_size)
        mean, var = _moments(x, groups)
        if not self.is_initializing():
            count = x[..., 0].size // groups
            running_mean.value = updated(running_mean.value, mean, self.momentum)
            unbiased = var * (count / (count - 1))
            running_var.value = updated(running_var.value, unbiased, self.momentum)
        factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
        # The mean is subtracted as a constant, and its derivative travels with the bias, where
        # it needs no pass over memory of its own.
        centre = jax.lax.stop_gradient(mean)
        offset = bias[None] - (mean - centre) * factor
        return (x - _at(x, centre)) * _at(x, factor) + _at(x, offset)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _moments(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of every group of images, (groups, channels) each.

    The variance is the mean square of what is left after subtracting the mean: E[x^2] - E[x]^2
    would lose all digits where the mean is 1000 deviations.
    """
    mean = _mean(x, groups)
    return mean, _mean(jnp.square(x - _at(x, mean)), groups)


@_moments.defjvp
def _moments_jvp(groups: int, primals: Any, tangents: Any) -> Any:
    # Differentiated as written, the variance would also act through the mean, by a sum that is
    # zero: the derivative on paper saves its passes over memory.
    (x,), (dx,) = primals, tangents
    mean, var = _moments(x, groups)
    dvar = 2 * _mean((x - _at(x, mean)) * dx, groups)
    return (mean, var), (_mean(dx, groups), dvar)


def _mean(x: jax.Array, groups: int) -> jax.Array:
    """The mean over the images and pixels of every group, (groups, channels)."""
    # Feature maps keep their four axes: compilers are bad at reductions of reshaped ones.
    if groups == 1:
        return x.mean(axis=(0, 1, 2))[None]
    return x.mean(axis=(1, 2)).reshape(groups, -1, x.shape[-1]).mean(axis=1)


def _at(x: jax.Array, per_group: jax.Array) -> jax.Array:
    """(groups, channels) shaped to act on `x`: every image gets its group's row."""
    groups, channels = per_group.shape
    if groups > 1:
        per_group = jnp.repeat(per_group, x.shape[0] // groups, axis=0)
    return per_group.reshape(-1, 1, 1, channels)


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
