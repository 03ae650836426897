"""Another training pass of a block: two of the three branches never exist.

In training every branch is normalised by the statistics of its own output. For two of them
these are known beforehand: with the mean mu and the covariance C of the block's *input* over
images and pixels, the 1x1 branch W'x has mean W'mu and variance diag(W'CW), and the identity
branch has mean mu and variance diag(C). So both fold into one 1x1 convolution before anything
of their size is computed,

    y = ReLU( s3 * (K3 * x)  +  A'x  +  b ),      A = W diag(s1) + diag(s0),

and everything but x, K3 * x and y is as small as a kernel. Automatic differentiation would
read and write the large arrays more often than needed; the backward pass is written out.
`docs/covariance.md` derives it and says how it is conditioned.

Values, statistics and gradients are those of the three branches in `repvgg_jax.block`, and
the tests hold the two together. Reverse mode only: forward mode needs the plain form.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Params = Mapping[str, Mapping[str, jax.Array]]
Statistics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fixed about a block; most of it as in `RepVGGBlock`.

    Attributes:
      stride: spatial stride.
      dilation: dilation of the 3x3 kernel, which is padded by as much.
      groups: channel groups of both convolutions, k below.
      identity: whether there is an identity branch.
      relu: whether the result goes through the ReLU.
      image_groups: parts of the batch, in order, with statistics of their own, G below.
      epsilon: added to the variances.
    """

    stride: int
    dilation: int
    groups: int
    identity: bool
    relu: bool
    image_groups: int
    epsilon: float


class Shift(NamedTuple):
    """Constants near the means, subtracted before anything is squared.

    Attributes:
      y3: near the mean of the 3x3 convolution's output, (G, features).
      x: near the mean of the input, (G, channels).
    """

    y3: jax.Array
    x: jax.Array


class Moments(NamedTuple):
    """First and second moments. Means are relative to `Shift`.

    Attributes:
      mean3: mean of the 3x3 convolution's output, (G, features).
      var3: its variance, (G, features).
      mean: mean of the input where the 1x1 kernel sees it, (G, channels).
      covariance: of the same, within channel groups, (G, k, channels / k, channels / k).
    """

    mean3: jax.Array
    var3: jax.Array
    mean: jax.Array
    covariance: jax.Array


class Folded(NamedTuple):
    """A block as scale * (y3 - shift.y3) + (kernel + diag(skip))'(x - shift.x) + bias.

    The identity stays apart from the kernel: it is multiplied in float32, as in the plain
    form, while the kernel takes part in a convolution and is rounded for it.

    Attributes:
      scale: of the 3x3 branch, (G, features).
      kernel: of the 1x1 branch, (G, k, channels / k, features / k).
      skip: scale of the identity branch, (G, features); None where there is none.
      bias: (G, features).
    """

    scale: jax.Array
    kernel: jax.Array
    skip: jax.Array | None
    bias: jax.Array


def train_block(form: Form, x: jax.Array, params: Params) -> tuple[jax.Array, Statistics]:
    """A block in training, with or without its ReLU.

    Args:
      form: what is fixed about the block.
      x: (images, height, width, channels) in the dtype of the convolutions.
      params: the parameters of its branches by the names in `repvgg_jax.block`.

    Returns:
      The output, (images, height/stride, width/stride, features) in the dtype of `x`, and by
      batch normalisation the mean and the biased variance it used, (G, features) each, in
      float32 (float64 for float64 inputs).
    """
    features = params["conv3x3"]["kernel"].shape[-1]
    few = 9 * x.shape[-1] <= features and form.groups == 1
    return (_by_patches if few else _by_branches)(form, x, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_branches(form: Form, x: jax.Array, params: Params) -> tuple[jax.Array, Statistics]:
    """The 3x3 branch is computed, the others fold into one 1x1 convolution."""
    return _forward(form, x, params)[0]


def _forward(form: Form, x: jax.Array, params: Params) -> tuple[Any, Any]:
    kernel = params["conv3x3"]["kernel"].astype(x.dtype)
    seen = _seen(form, x)
    y3 = _conv3x3(form, x, kernel)
    shift, moments = _measure(form, x, seen, y3, kernel)
    folded, statistics = _fold(form, x.dtype, shift, params, moments)

    bias = folded.bias - folded.scale * shift.y3 - _apply(shift.x, folded.kernel)
    z = _conv1x1(seen, folded.kernel, _wide(x.dtype)) + _at(y3, folded.scale) * y3
    if folded.skip is not None:
        bias -= folded.skip * shift.x
        z += _at(x, folded.skip) * x
    z += _at(y3, bias)
    out = (jnp.maximum(z, 0) if form.relu else z).astype(x.dtype)
    return (out, statistics), (x, seen, y3, out, params, shift, moments)


def _backward(form: Form, residuals: Any, cotangents: Any) -> tuple[jax.Array, Any]:
    x, seen, y3, out, params, shift, moments = residuals
    dout, dstatistics = cotangents
    kernel = params["conv3x3"]["kernel"].astype(x.dtype)
    count = _count(form, y3)
    dz = jnp.where(out > 0, dout, 0) if form.relu else dout

    # What reaches the folded block: sums over images and pixels.
    dbias = _sum(form, dz)
    dscale = _sum(form, dz * (y3 - _at(y3, shift.y3)))
    dfolded = _outer(form, seen, dz) - _outer_small(form, shift.x, dbias)
    dskip = _diagonal(dfolded) if form.identity else None

    # From there to the parameters and the moments. Nothing here is larger than a kernel.
    fold = functools.partial(_fold, form, x.dtype, shift)
    small = {name: piece for name, piece in params.items() if name != "conv3x3"}
    (folded, _), pull = jax.vjp(fold, small, moments)
    dparams, dmoments = pull((Folded(dscale, dfolded, dskip, dbias), dstatistics))

    # The 3x3 branch: y3 acts through its scale, its mean and its variance.
    slope = dmoments.var3 * (2 / count)
    level = dmoments.mean3 / count - slope * (shift.y3 + moments.mean3)
    dy3 = _at(y3, folded.scale) * dz + (_at(y3, slope) * y3 + _at(y3, level))
    dy3 = dy3.astype(x.dtype)
    (dkernel,) = jax.linear_transpose(lambda kernel: _conv3x3(form, x, kernel), kernel)(dy3)

    # The other two: x acts through the folded kernel, its mean and its covariance.
    slope = dmoments.covariance + dmoments.covariance.swapaxes(-1, -2)
    slope = _round(slope / count, x.dtype)
    level = dmoments.mean / count - _apply(shift.x + moments.mean, slope)
    dseen = _conv1x1_of_two(dz, folded.kernel.swapaxes(-1, -2), seen, slope) + _at(seen, level)
    if folded.skip is not None:
        dseen += _at(dz, folded.skip) * dz
    dx = _spread(form, dy3, kernel, dseen, x)

    dkernel = dkernel.astype(params["conv3x3"]["kernel"].dtype)
    return dx, {**dparams, "conv3x3": {"kernel": dkernel}}


_by_branches.defvjp(_forward, _backward)


def _by_patches(form: Form, x: jax.Array, params: Params) -> tuple[jax.Array, Statistics]:
    """Both convolutions fold into one: for a first layer, with more features than patch.

    The nine pixels under a 3x3 kernel are a vector of 27 numbers on colour images, and every
    branch is a linear map of it. Its covariance has the statistics of them all, so that the
    output is the only large array that is kept. There is no identity: the channels differ.
    """
    dtype, wide = x.dtype, _wide(x.dtype)
    seen = _patches(form, x)
    near, mean, covariance = _mean_and_covariance(form, seen)

    kernel3x3, kernel1x1 = (params[name]["kernel"] for name in ("conv3x3", "conv1x1"))
    centred = jnp.pad(kernel1x1, ((1, 1), (1, 1), (0, 0), (0, 0)))
    folded, bias, statistics = jnp.zeros(()), jnp.zeros(()), {}
    for norm, kernel in (("bn3x3", kernel3x3), ("bn1x1", centred)):
        kernel = _round(kernel.reshape(1, 1, seen.shape[-1], -1), dtype)
        product = jnp.matmul(covariance, kernel, precision="highest")
        var = jnp.maximum(_flat((kernel * product).sum(axis=-2)), 0)
        statistics[norm] = (_apply(near.astype(wide) + mean, kernel), var)
        scale = params[norm]["scale"][None] * lax.rsqrt(var + form.epsilon)
        folded += kernel * _in_groups(form, scale)[..., None, :]
        bias += params[norm]["bias"][None]
    folded = _round(folded, dtype)
    bias -= _apply(near.astype(wide) + mean, folded)

    if form.image_groups == 1:
        folded = folded.reshape(kernel3x3.shape).astype(dtype)
        z = _conv3x3(form, x, folded, preferred_element_type=wide)
    else:
        z = _conv1x1(seen, folded, wide)
    z += _at(z, bias)
    return (_relu(z, dtype) if form.relu else z.astype(dtype)), statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _relu(z: jax.Array, dtype: Any) -> jax.Array:
    """ReLU, rounded; its derivative needs the output only, which the next layer keeps anyway."""
    return jnp.maximum(z, 0).astype(dtype)


def _relu_forward(z: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    out = _relu(z, dtype)
    return out, out


def _relu_backward(dtype: Any, out: jax.Array, dout: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(out > 0, dout, 0).astype(_wide(dtype)),)


_relu.defvjp(_relu_forward, _relu_backward)


def _measure(
    form: Form, x: jax.Array, seen: jax.Array, y3: jax.Array, kernel: jax.Array
) -> tuple[Shift, Moments]:
    """The moments of a block's input and of its 3x3 convolution's output."""
    count = _count(form, y3)
    near, mean, covariance = _mean_and_covariance(form, seen)

    # What the 3x3 convolution makes of a constant image, on average over pixels: its mean
    # up to the deviations of x. Near the border some taps see only padding.
    summed = (_share_inside(form, x, y3)[:, :, None, None] * kernel).sum(axis=(0, 1))
    near3 = _apply(near.astype(mean.dtype), _in_groups(form, summed).swapaxes(0, 1)[None])
    shifted3 = y3 - _at(y3, near3)
    mean3 = _sum(form, shifted3) / count
    var3 = jnp.maximum(_sum(form, jnp.square(shifted3)) / count - jnp.square(mean3), 0)
    return Shift(near3, near.astype(mean.dtype)), Moments(mean3, var3, mean, covariance)


def _mean_and_covariance(form: Form, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A constant near the mean, the mean relative to it, and the covariance."""
    count = _count(form, seen)
    mean = _sum(form, seen) / count
    # In the convolutions' dtype, so that subtracting it from x loses nothing more.
    near = lax.stop_gradient(mean.astype(seen.dtype))
    shifted = seen - _at(seen, near)
    mean -= near
    covariance = _outer(form, shifted, shifted) / count - _outer_small(form, mean, mean)
    return near, mean, covariance


def _fold(
    form: Form, dtype: Any, shift: Shift, params: Params, moments: Moments
) -> tuple[Folded, Statistics]:
    """Folds the block, given the moments; also its three normalisations' mean and variance.

    The kernels are rounded to `dtype`, as the convolution will do, before the bias is
    computed: it then centres what is really computed.
    """
    kernel = _round(params["conv1x1"]["kernel"][0, 0], dtype)
    kernel = _in_groups(form, kernel).swapaxes(0, 1)[None]
    mean = shift.x + moments.mean
    product = jnp.matmul(moments.covariance, kernel, precision="highest")
    statistics = {
        "bn3x3": (shift.y3 + moments.mean3, moments.var3),
        "bn1x1": (_apply(mean, kernel), _flat((kernel * product).sum(axis=-2))),
    }
    if form.identity:
        statistics["bn_identity"] = (mean, _diagonal(moments.covariance))
    # Rounding can take a variance of nothing below zero.
    statistics = {norm: (mean, jnp.maximum(var, 0)) for norm, (mean, var) in statistics.items()}
    scale = {
        norm: params[norm]["scale"][None] * lax.rsqrt(var + form.epsilon)
        for norm, (_, var) in statistics.items()
    }
    kernel = _round(kernel * _in_groups(form, scale["bn1x1"])[..., None, :], dtype)
    skip = scale.get("bn_identity")
    bias = -scale["bn3x3"] * moments.mean3 - _apply(moments.mean, kernel)
    for norm in statistics:
        bias += params[norm]["bias"][None]
    if skip is not None:
        bias -= skip * moments.mean
    return Folded(scale["bn3x3"], kernel, skip, bias), statistics


# Large arrays, (images, height, width, channels).


def _conv3x3(form: Form, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
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


def _conv1x1(x: jax.Array, kernels: jax.Array, dtype: Any = None) -> jax.Array:
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


def _conv1x1_of_two(
    x: jax.Array, x_kernels: jax.Array, y: jax.Array, y_kernels: jax.Array
) -> jax.Array:
    """The sum of `_conv1x1` of `x` and of `y`, of equal shapes but for their channels."""
    if x_kernels.shape[1] > 1:
        return _conv1x1(x, x_kernels) + _conv1x1(y, y_kernels)
    # Side by side they are one convolution, to which compilers attach what comes after it; the
    # output of a second one would go through memory.
    both = jnp.concatenate([x, y], axis=-1)
    return _conv1x1(both, jnp.concatenate([x_kernels, y_kernels], axis=-2))


def _outer(form: Form, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums of x y' over the images and pixels of every group, (G, k, x's / k, y's / k)."""
    wide = _wide(x.dtype)
    # Accelerators multiply float32 with fewer bits unless told otherwise.
    precision = "highest" if x.dtype == wide else None
    x, y = (
        a.reshape(form.image_groups, -1, *a.shape[1:3], form.groups, a.shape[-1] // form.groups)
        for a in (x, y)
    )
    return jnp.einsum("gnhwki,gnhwko->gkio", x, y, precision=precision, preferred_element_type=wide)


def _sum(form: Form, x: jax.Array) -> jax.Array:
    """Sums over the images and pixels of every group, (G, channels)."""
    sums = x.astype(_wide(x.dtype)).sum(axis=(1, 2))
    return sums.reshape(form.image_groups, -1, x.shape[-1]).sum(axis=1)


def _at(x: jax.Array, per_group: jax.Array) -> jax.Array:
    """(G, channels) shaped to act on `x`: every image gets its group's row."""
    groups, channels = per_group.shape
    if groups > 1:
        per_group = jnp.repeat(per_group, x.shape[0] // groups, axis=0)
    return per_group.reshape(-1, 1, 1, channels)


def _patches(form: Form, x: jax.Array) -> jax.Array:
    """The nine pixels under the 3x3 kernel, (images, height/stride, width/stride, 9 channels)."""
    channels = x.shape[-1]
    # One convolution, by kernels that are 1 at one tap of one channel; exact at this precision.
    taps = jnp.eye(9 * channels, dtype=x.dtype).reshape(3, 3, channels, -1)
    return _conv3x3(form, x, taps, precision="highest")


def _seen(form: Form, x: jax.Array) -> jax.Array:
    """The pixels that a 1x1 kernel sees."""
    if form.stride == 1:
        return x
    # Five computations read these few pixels. Made once they cost less than reading all of x
    # for each, which compilers prefer to do unless there is a barrier.
    return lax.optimization_barrier(x[:, :: form.stride, :: form.stride])


def _spread(
    form: Form, dy3: jax.Array, kernel: jax.Array, dseen: jax.Array, x: jax.Array
) -> jax.Array:
    """What `dy3` is under the 3x3 convolution's transpose, plus `dseen` where it was seen."""

    def transpose(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        (dx,) = jax.linear_transpose(lambda x: _conv3x3(form, x, kernel), x)(dy)
        return dx

    if form.stride == 1:
        return (transpose(kernel, dy3) + dseen).astype(x.dtype)
    # Between the pixels of `dseen` would be zeros, in an array as large as x. Instead it goes
    # through the same convolution, beside dy3, by a kernel that is 1 in the middle.
    channels = x.shape[-1] // form.groups
    one = jnp.zeros((3, 3, channels, channels), x.dtype).at[1, 1].set(jnp.eye(channels))
    one = jnp.tile(one, form.groups)
    return transpose(
        _side_by_side(form, kernel, one), _side_by_side(form, dy3, dseen.astype(x.dtype))
    )


def _side_by_side(form: Form, x: jax.Array, y: jax.Array) -> jax.Array:
    """Their last axes joined, every channel group with its own."""
    parts = [a.reshape(*a.shape[:-1], form.groups, -1) for a in (x, y)]
    return jnp.concatenate(parts, axis=-1).reshape(*x.shape[:-1], -1)


def _count(form: Form, y3: jax.Array) -> int:
    """Values per channel in one image group of the output."""
    return y3[..., 0].size // form.image_groups


def _share_inside(form: Form, x: jax.Array, y3: jax.Array) -> jax.Array:
    """For each tap of the 3x3 kernel the share of output pixels where it sees no padding."""

    def along(axis: int) -> np.ndarray:
        centres = np.arange(y3.shape[axis])[:, None] * form.stride
        taps = centres + np.array([-1, 0, 1]) * form.dilation
        return ((taps >= 0) & (taps < x.shape[axis])).mean(axis=0)

    return jnp.asarray(np.outer(along(1), along(2)), _wide(x.dtype))


# Small arrays, (G, channels) or (G, k, in / k, out / k).


def _apply(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """Every group's x'M, (G, out)."""
    groups = matrices.shape[1]
    x = x.reshape(x.shape[0], groups, 1, -1)
    return _flat(jnp.matmul(x, matrices, precision="highest"))


def _outer_small(form: Form, x: jax.Array, y: jax.Array) -> jax.Array:
    """Every group's x y'."""
    return _in_groups(form, x)[..., :, None] * _in_groups(form, y)[..., None, :]


def _in_groups(form: Form, x: jax.Array) -> jax.Array:
    """Splits the last axis into channel groups, (…, k, channels / k)."""
    return x.reshape(*x.shape[:-1], form.groups, -1)


def _diagonal(matrices: jax.Array) -> jax.Array:
    """Every group's diagonal, (G, channels)."""
    # A sum, which compilers attach to what is around it; `jnp.diagonal` gathers and scatters.
    on_it = jnp.eye(matrices.shape[-1], dtype=bool)
    return _flat(jnp.where(on_it, matrices, 0).sum(axis=-1))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _round(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds to the values of `dtype` without changing the type; differentiates as x."""
    if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    # Not two conversions, which the compiler may drop.
    info = jnp.finfo(dtype)
    return x + lax.stop_gradient(lax.reduce_precision(x, info.nexp, info.nmant) - x)


def _wide(dtype: Any) -> Any:
    """What sums and statistics are computed in."""
    return jnp.promote_types(dtype, jnp.float32)
