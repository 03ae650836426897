"""Feature maps, (images, height, width, channels), and sums over their images and pixels."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.covariance.form import Form
from repvgg_jax.covariance.small import outer_small


def conv3x3(form: Form, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """The block's 3x3 convolution; `options` are those of `lax.conv_general_dilated`."""
    pad = (form.dilation, form.dilation)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(form.stride, form.stride),
        padding=(pad, pad),
        rhs_dilation=(form.dilation, form.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=form.groups,
        **options,
    )


def conv1x1(x: jax.Array, kernels: jax.Array, dtype: Any = None) -> jax.Array:
    """Every image group of `x` through its own 1x1 kernel (G, k, in / k, out / k).

    The result is in `dtype`, that of `x` if None.
    """
    image_groups, groups, _, _ = kernels.shape
    kernels = kernels.astype(x.dtype)
    if image_groups == 1:  # a convolution, whose layout in memory the compiler may choose
        kernel = kernels[0].swapaxes(0, 1).reshape(1, 1, kernels.shape[2], -1)
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            preferred_element_type=dtype,
        )
    n, h, w, _ = x.shape
    parts = x.reshape(image_groups, -1, h, w, groups, kernels.shape[2])
    out = jnp.einsum("gnhwki,gkio->gnhwko", parts, kernels, preferred_element_type=dtype)
    return out.reshape(n, h, w, -1)


def conv1x1_of_two(
    x: jax.Array, x_kernels: jax.Array, y: jax.Array, y_kernels: jax.Array
) -> jax.Array:
    """The sum of `conv1x1` of `x` and of `y`, of equal shapes but for their channels."""
    if x_kernels.shape[1] > 1:
        return conv1x1(x, x_kernels) + conv1x1(y, y_kernels)
    # Side by side they are one convolution, to which compilers attach what comes after it; the
    # output of a second one would go through memory.
    both = jnp.concatenate([x, y], axis=-1)
    return conv1x1(both, jnp.concatenate([x_kernels, y_kernels], axis=-2))


def outer(form: Form, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums of x y' over the images and pixels of every group, (G, k, x's / k, y's / k)."""
    wide = wide_type(x.dtype)
    # Accelerators multiply float32 with fewer bits unless told otherwise.
    precision = "highest" if x.dtype == wide else None
    x, y = (
        a.reshape(form.image_groups, -1, *a.shape[1:3], form.groups, a.shape[-1] // form.groups)
        for a in (x, y)
    )
    return jnp.einsum("gnhwki,gnhwko->gkio", x, y, precision=precision, preferred_element_type=wide)


def sums(form: Form, x: jax.Array) -> jax.Array:
    """Sums over the images and pixels of every group, (G, channels)."""
    sums = x.astype(wide_type(x.dtype)).sum(axis=(1, 2))
    return sums.reshape(form.image_groups, -1, x.shape[-1]).sum(axis=1)


def mean_and_covariance(
    form: Form, seen: jax.Array, columns: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A constant near the mean, the mean relative to it, and the covariance.

    Where `columns` pixels lie side by side on the last axis, they are so many values of each
    channel.
    """
    channels = seen.shape[-1] // columns
    count = values_per_channel(form, seen) * columns
    mean = sums(form, seen).reshape(-1, columns, channels).sum(axis=1) / count
    # In the convolutions' dtype, so that subtracting it from x loses nothing more.
    near = lax.stop_gradient(mean.astype(seen.dtype))
    shifted = seen - at(seen, jnp.tile(near, columns))
    mean -= near
    products = jnp.split(outer(form, shifted, shifted), columns, axis=-2)
    # Those of a column with itself lie on the diagonal.
    own = [jnp.split(row, columns, axis=-1)[i] for i, row in enumerate(products)]
    return near, mean, sum(own[1:], own[0]) / count - outer_small(form, mean, mean)


def at(x: jax.Array, per_group: jax.Array) -> jax.Array:
    """(G, channels) shaped to act on `x`: every image gets its group's row."""
    groups, channels = per_group.shape
    if groups > 1:
        per_group = jnp.repeat(per_group, x.shape[0] // groups, axis=0)
    return per_group.reshape(-1, 1, 1, channels)


def values_per_channel(form: Form, y3: jax.Array) -> int:
    """Values per channel in one image group of the output."""
    return y3[..., 0].size // form.image_groups


def wide_type(dtype: Any) -> Any:
    """What sums and statistics are computed in."""
    return jnp.promote_types(dtype, jnp.float32)
