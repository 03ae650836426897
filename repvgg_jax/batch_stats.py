"""Statistics of feature maps over groups of images, and the running averages of them.

Feature maps are (images, height, width, channels). A batch is split into G groups of images, in
order; every group has statistics of its own, (G, channels).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...]


def image_groups(
    shape: tuple[int, ...], size: int | None, axis_name: AxisName | None = None
) -> int:
    """How many groups of `size` images (None for all) share statistics in a batch.

    Args:
      shape: of the feature maps that are normalized, (images, height, width, channels).
      size: images per group.
      axis_name: of the devices whose images are one batch; then there is one group.

    Raises:
      ValueError: the groups do not divide the batch, or have one value per channel only.
    """
    images, height, width, _ = shape
    if axis_name is not None:
        if size is not None:
            raise ValueError(
                f"batch normalization over the axis {axis_name!r} is over the whole batch, but "
                f"groups of {size} images were asked for; give one of axis_name and bn_group_size"
            )
        images *= jax.lax.axis_size(axis_name)
    if images == 0:
        raise ValueError(f"a batch without images, {shape}, has no statistics to normalize by")
    size = size or images
    if images % size:
        raise ValueError(
            f"batch normalization groups of {size} images do not divide "
            f"a batch of {images}; the batch must be a multiple of the group"
        )
    if size * height * width < 2:
        raise ValueError(
            "batch normalization in training needs more than one value per channel, "
            f"got feature maps of shape {shape}; use larger images or a larger batch"
        )
    return images // size if axis_name is None else 1


def values_per_channel(
    shape: tuple[int, ...], groups: int, axis_name: AxisName | None = None
) -> int:
    """Values per channel that share statistics."""
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    return math.prod(shape[:3]) * devices // groups


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def moments(
    x: jax.Array, groups: int, axis_name: AxisName | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of every group of images, (groups, channels) each.

    The variance is the mean square of what is left after subtracting the mean; E[x^2] - E[x]^2
    would lose all digits if the mean is 1000 standard deviations.

    Args:
      x: feature maps.
      groups: of images.
      axis_name: of the devices whose images are one batch, under `jax.shard_map`.
    """
    mean = _mean(x, groups, axis_name)
    return mean, _mean(jnp.square(x - per_image(x, mean)), groups, axis_name)


@moments.defjvp
def _moments_jvp(groups: int, axis_name: AxisName | None, primals: Any, tangents: Any) -> Any:
    # The term through the mean vanishes analytically; a JVP by hand avoids computing it.
    (x,), (dx,) = primals, tangents
    mean, var = moments(x, groups, axis_name)
    dvar = 2 * _mean((x - per_image(x, mean)) * dx, groups, axis_name)
    return (mean, var), (_mean(dx, groups, axis_name), dvar)


def _mean(x: jax.Array, groups: int, axis_name: AxisName | None) -> jax.Array:
    """The mean over the images and pixels of every group, (groups, channels)."""
    # Feature maps keep their four axes: compilers handle reductions of reshaped ones badly.
    if groups == 1:
        mean = x.mean(axis=(0, 1, 2))[None]
    else:
        mean = x.mean(axis=(1, 2)).reshape(groups, -1, x.shape[-1]).mean(axis=1)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def per_image(x: jax.Array, per_group: jax.Array) -> jax.Array:
    """(groups, channels) in a shape that broadcasts against `x`: each image its group's row."""
    groups, channels = per_group.shape
    if groups > 1:
        per_group = jnp.repeat(per_group, x.shape[0] // groups, axis=0)
    return per_group.reshape(-1, 1, 1, channels)


def updated_running(
    mean: jax.Array,
    var: jax.Array,
    batch_mean: jax.Array,
    batch_var: jax.Array,
    count: int,
    momentum: float,
) -> tuple[jax.Array, jax.Array]:
    """Running mean and variance after a batch, in PyTorch's convention.

    Args:
      mean: running mean, (channels,).
      var: running variance, (channels,).
      batch_mean: (groups, channels); the running mean takes the mean over groups.
      batch_var: biased variance, (groups, channels). The running variance is the unbiased one.
      count: values per channel in a group.
      momentum: share of the old value that is kept.
    """

    def updated(running: jax.Array, batch: jax.Array) -> jax.Array:
        batch = batch.reshape(-1, batch.shape[-1]).mean(axis=0).astype(running.dtype)
        return momentum * running + (1 - momentum) * batch

    return updated(mean, batch_mean), updated(var, batch_var * (count / (count - 1)))
