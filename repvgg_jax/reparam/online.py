"""Training a sum of branches as the one convolution that it is (OREPA, CVPR 2022, section 3.3).

Branches without norms of their own add up to one kernel in training, too, so only their kernels
are added, and feature maps exist once.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.batch_stats import moments, per_image
from repvgg_jax.covariance import BlockSettings
from repvgg_jax.meshes import grouped_convolution
from repvgg_jax.reparam.algebra import affine
from repvgg_jax.reparam.linear import Geometry
from repvgg_jax.reparam.terms import Chain, Linear, Norm


def online_train(
    train: Linear, settings: BlockSettings, x: jax.Array, params: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """The training pass of an expression whose only norm is the last term.

    Args:
      train: a chain of an expression without norms or biases, and a norm; bound by
        `functools.partial` to be a `BlockSpec.fast_train`.
      settings: of the block.
      x: feature maps.
      params: of the block by child name.

    Returns:
      The block's output, and mean and biased variance of every group of images by norm.
    """
    assert isinstance(train, Chain)
    inner, norm = Chain(train.terms[:-1]), train.terms[-1]
    assert isinstance(norm, Norm)
    own = params[norm.name]
    geometry = Geometry(
        in_channels=x.shape[-1],
        features=own["scale"].shape[-1],
        groups=settings.groups,
        same_shape=settings.identity,
    )
    kernel = affine(inner, geometry, params, {}).kernel
    reach = [settings.dilation * (side // 2) for side in kernel.shape[:2]]
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(settings.stride, settings.stride),
        padding=[(side, side) for side in reach],
        rhs_dilation=(settings.dilation, settings.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=settings.groups,
    )
    y = grouped_convolution(convolve, x, kernel.astype(x.dtype))
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    mean, var = moments(wide, settings.image_groups)
    factor = jax.lax.rsqrt(var + settings.epsilon) * own["scale"][None]
    centered = wide - per_image(wide, mean)
    out = centered * per_image(wide, factor) + per_image(wide, own["bias"][None])
    out = out.astype(x.dtype)
    out = settings.activation(out) if settings.activation else out
    return out, {norm.name: (mean, var)}
