"""A first layer: its statistics come from the covariance of the pixels under the kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repvgg_jax.batch_stats import per_image
from repvgg_jax.covariance.ops import (
    BlockSettings,
    Params,
    Statistics,
    apply,
    conv1x1,
    conv3x3,
    flat,
    in_groups,
    matmul,
    mean_and_covariance,
    on_gpus,
    rounded,
    wide_type,
)

_LANES = 128  # TPU lane width: the minor dimension of an array is padded to it


def from_patches(
    settings: BlockSettings, x: jax.Array, params: Params
) -> tuple[jax.Array, Statistics]:
    """Both convolutions fold into one: for a first layer, with more features than patch.

    The nine pixels under a 3x3 kernel are a vector of 27 numbers on color images, and every
    branch is a linear map of it. Its covariance has the statistics of them all, so that the
    output is the only large array that is kept. There is no identity: the channels differ.
    """
    return on_gpus(_from_patches_on, settings, x, params)


def _from_patches_on(
    settings: BlockSettings, x: jax.Array, params: Params
) -> tuple[jax.Array, Statistics]:
    dtype, wide = x.dtype, wide_type(x.dtype)
    # On GPUs the product goes through memory, where 32 bits would take twice the room.
    out = None if settings.on_gpu else wide
    patches, columns = _patches(settings, x)
    near, mean, covariance = mean_and_covariance(settings, patches, columns)

    kernel3x3, kernel1x1 = (params[name]["kernel"] for name in ("conv3x3", "conv1x1"))
    centered = jnp.pad(kernel1x1, ((1, 1), (1, 1), (0, 0), (0, 0)))
    folded, bias, statistics = jnp.zeros(()), jnp.zeros(()), {}
    for norm, kernel in (("bn3x3", kernel3x3), ("bn1x1", centered)):
        kernel = rounded(kernel.reshape(1, 1, 9 * x.shape[-1], -1), dtype)
        product = matmul(covariance, kernel)
        var = jnp.maximum(flat((kernel * product).sum(axis=-2)), 0)
        statistics[norm] = (apply(near.astype(wide) + mean, kernel), var)
        scale = params[norm]["scale"][None] * lax.rsqrt(var + settings.epsilon)
        folded += kernel * in_groups(settings, scale)[..., None, :]
        bias += params[norm]["bias"][None]
    folded = rounded(folded, dtype)
    bias -= apply(near.astype(wide) + mean, folded)

    if settings.image_groups == 1:
        folded = folded.reshape(kernel3x3.shape).astype(dtype)
        z = conv3x3(settings, x, folded, preferred_element_type=out)
    else:
        z = conv1x1(patches.reshape(*patches.shape[:2], -1, 9 * x.shape[-1]), folded, out)
    z += per_image(z, bias)
    return (_relu(z, dtype) if settings.relu else z.astype(dtype)), statistics


def _patches(settings: BlockSettings, x: jax.Array) -> tuple[jax.Array, int]:
    """The nine pixels under the 3x3 kernel, of as many columns side by side as there is room for.

    Returns:
      (images, height/stride, width/stride/columns, columns x 9 channels), and how many columns.
    """
    channels, dilation, stride = x.shape[-1], settings.dilation, settings.stride
    width = -(-x.shape[2] // stride)
    most = max(1, _LANES // (9 * channels))
    columns = max(n for n in range(1, most + 1) if width % n == 0)
    # One convolution, by kernels that are 1 at one tap of one channel; exact at this precision.
    taps = np.zeros(
        (3, (columns - 1) * stride + 2 * dilation + 1, channels, columns, 3, 3, channels)
    )
    for column, row, tap in np.ndindex(columns, 3, 3):
        taps[row, column * stride + tap * dilation, :, column, row, tap] = np.eye(channels)
    beyond = (width - 1) * stride + dilation + 1 - x.shape[2]
    patches = lax.conv_general_dilated(
        x,
        jnp.asarray(taps.reshape(*taps.shape[:3], -1), x.dtype),
        window_strides=(stride, columns * stride),
        padding=((dilation, dilation), (dilation, beyond)),
        rhs_dilation=(dilation, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return patches, columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _relu(z: jax.Array, dtype: Any) -> jax.Array:
    """ReLU, rounded; its derivative needs the output only, which the next layer keeps anyway."""
    return jnp.maximum(z, 0).astype(dtype)


def _relu_forward(z: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    out = _relu(z, dtype)
    return out, out


def _relu_backward(dtype: Any, out: jax.Array, dout: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(out > 0, dout, 0).astype(wide_type(dtype)),)


_relu.defvjp(_relu_forward, _relu_backward)
