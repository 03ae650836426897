"""RepVGG blocks in training: the 3x3 branch is computed, the others become one 1x1 convolution."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repvgg_jax.batch_stats import per_image, values_per_channel
from repvgg_jax.covariance import pallas_gpu
from repvgg_jax.covariance.first_layer import from_patches
from repvgg_jax.covariance.ops import (
    BlockSettings,
    Params,
    Statistics,
    apply,
    conv1x1,
    conv1x1_of_two,
    conv3x3,
    diagonal,
    flat,
    in_groups,
    less_apply,
    matmul,
    mean_and_covariance,
    on_diagonal,
    on_gpus,
    outer,
    outer_small,
    rounded,
    sums,
    sums_of_two,
    wide_type,
)
from repvgg_jax.meshes import on_auto_axes, varying_alike


def train_block(
    settings: BlockSettings, x: jax.Array, params: Params
) -> tuple[jax.Array, Statistics]:
    """A RepVGG block in training, its activation included.

    Args:
      settings: what is fixed about the block.
      x: (images, height, width, channels) in the dtype of the convolutions.
      params: parameters by the child names of `repvgg_jax.reparam.REPVGG`.

    Returns:
      The output, (images, height/stride, width/stride, features) in the dtype of `x`, and per
      norm the mean and the biased variance that it used, (G, features) each, in float32
      (float64 for float64 inputs).
    """
    x, params = varying_alike((x, params))
    y, statistics = on_auto_axes(functools.partial(_train, settings), x, params)
    if settings.activation is not None and not settings.relu:
        y = settings.activation(y)
    return y, statistics


def _train(settings: BlockSettings, x: jax.Array, params: Params) -> tuple[jax.Array, Statistics]:
    features = params["conv3x3"]["kernel"].shape[-1]
    few_inputs = 9 * x.shape[-1] <= features and settings.groups == 1
    return (from_patches if few_inputs else from_3x3_output)(settings, x, params)


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
      var: its variance, (G, channels).
      var1: variance of the 1x1 convolution's output, (G, features).
    """

    mean3: jax.Array
    var3: jax.Array
    mean: jax.Array
    var: jax.Array
    var1: jax.Array


class Folded(NamedTuple):
    """A block as scale * (y3 - shift.y3) + (kernel + diag(skip))'(x - shift.x) + bias.

    The identity stays apart from the kernel: it is multiplied in float32, as in the plain
    settings, while the kernel takes part in a convolution and is rounded for it. On GPUs, where
    it would cost a pass through memory, it is part of the kernel.

    Attributes:
      scale: of the 3x3 branch, (G, features).
      kernel: of the 1x1 branch, (G, k, channels / k, features / k).
      skip: scale of the identity branch, (G, features); None if there is none.
      bias: (G, features).
    """

    scale: jax.Array
    kernel: jax.Array
    skip: jax.Array | None
    bias: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_3x3_output(
    settings: BlockSettings, x: jax.Array, params: Params
) -> tuple[jax.Array, Statistics]:
    """The 3x3 branch is computed, the others fold into one 1x1 convolution."""
    return _forward(settings, x, params)[0]


def _forward(settings: BlockSettings, x: jax.Array, params: Params) -> tuple[Any, Any]:
    return on_gpus(_forward_on, settings, x, params)


def _backward(settings: BlockSettings, residuals: Any, cotangents: Any) -> tuple[jax.Array, Any]:
    return on_gpus(_backward_on, settings, residuals, cotangents)


from_3x3_output.defvjp(_forward, _backward)


def _forward_on(settings: BlockSettings, x: jax.Array, params: Params) -> tuple[Any, Any]:
    kernel = params["conv3x3"]["kernel"].astype(x.dtype)
    seen = _seen(settings, x)
    y3 = conv3x3(settings, x, kernel)
    pointwise = _pointwise(settings, x.dtype, params["conv1x1"]["kernel"])
    shift, moments, product = _measure(settings, x, seen, y3, kernel, pointwise)
    folded, statistics = _fold(settings, x.dtype, shift, params, pointwise, moments)

    bias = folded.bias
    if settings.shifts(x.dtype):
        bias -= folded.scale * shift.y3 + apply(shift.x, folded.kernel)
    # Where the product goes through memory, more bits would take more room.
    product1x1 = conv1x1(
        seen,
        folded.kernel,
        None if settings.on_gpu else wide_type(x.dtype),
        on_gpu=settings.on_gpu,
    )
    z = product1x1 + per_image(y3, folded.scale) * y3
    if folded.skip is not None:
        bias -= folded.skip * shift.x
        z += per_image(x, folded.skip) * x
    z += per_image(y3, bias)
    out = (jnp.maximum(z, 0) if settings.relu else z).astype(x.dtype)
    return (out, statistics), (x, seen, y3, out, params, shift, moments, product)


def _backward_on(settings: BlockSettings, residuals: Any, cotangents: Any) -> tuple[jax.Array, Any]:
    x, seen, y3, out, params, shift, moments, product = residuals
    dout, dstatistics = cotangents
    kernel = params["conv3x3"]["kernel"].astype(x.dtype)
    count = values_per_channel(y3.shape, settings.image_groups)
    dz = jnp.where(out > 0, dout, 0) if settings.relu else dout

    # What reaches the folded block: sums over images and pixels.
    dfolded = outer(settings, seen, dz)
    near3 = y3.astype(dfolded.dtype)
    if settings.shifts(x.dtype):
        near3 -= per_image(y3, shift.y3)
    dbias, dscale = sums_of_two(settings, dz, dz * near3)
    if settings.shifts(x.dtype):
        dfolded -= outer_small(settings, shift.x, dbias)
    dskip = diagonal(dfolded) if settings.identity and not settings.on_gpu else None

    # From there to the parameters and the moments. Nothing here is larger than a vector of
    # channels, or a kernel.
    fold = functools.partial(_fold, settings, x.dtype, shift)
    norms = {name: piece for name, piece in params.items() if name.startswith("bn")}
    pointwise, to_kernel = jax.vjp(
        functools.partial(_pointwise, settings, x.dtype), params["conv1x1"]["kernel"]
    )
    (folded, _), pull = jax.vjp(fold, norms, pointwise, moments)
    dnorms, dpointwise, dmoments = pull((Folded(dscale, dfolded, dskip, dbias), dstatistics))

    # The 3x3 branch: y3 acts through its scale, its mean and its variance.
    slope = dmoments.var3 * (2 / count)
    level = dmoments.mean3 / count - slope * (shift.y3 + moments.mean3)
    dy3 = per_image(y3, folded.scale) * dz + (per_image(y3, slope) * y3 + per_image(y3, level))
    dy3 = dy3.astype(x.dtype)
    (dkernel,) = jax.linear_transpose(lambda kernel: conv3x3(settings, x, kernel), kernel)(dy3)

    # The other two: x acts through the folded kernel, its mean and its covariance C, and C
    # through the variances diag(W'CW) and diag(C). W acts through the first of them, too.
    dvar1 = in_groups(settings, dmoments.var1)[..., None, :]
    dpointwise += 2 * (dvar1 * product).sum(axis=0, keepdims=True)
    dcovariance = matmul(dvar1 * pointwise, pointwise.swapaxes(-1, -2))
    if settings.identity:
        dcovariance += on_diagonal(settings, dmoments.var)
    slope = rounded(dcovariance * (2 / count), x.dtype)
    level = less_apply(settings, dmoments.mean / count, shift.x + moments.mean, slope)
    to_dz = folded.kernel.swapaxes(-1, -2)
    if pallas_gpu.serves(settings, x, y3):
        transposed = _transpose(settings, kernel, dy3, x)
        dx = pallas_gpu.input_gradient(transposed, dz, x, to_dz[0, 0], slope[0, 0], level[0])
    else:
        dseen = conv1x1_of_two(settings, dz, to_dz, seen, slope)
        dseen += per_image(seen, level)
        if folded.skip is not None:
            dseen += per_image(dz, folded.skip) * dz
        dx = _spread(settings, dy3, kernel, dseen, x)

    if settings.on_gpu:
        # Into the parameters' order before the optimizer reads it. Otherwise XLA attaches the
        # transposition to the update, which then is not done in place: both the parameters and
        # their momentum are copied. Of a vector there is only one order.
        dkernel = lax.optimization_barrier(dkernel.reshape(-1)).reshape(dkernel.shape)
    dkernel = dkernel.astype(params["conv3x3"]["kernel"].dtype)
    (dkernel1x1,) = to_kernel(dpointwise)
    return dx, {**dnorms, "conv3x3": {"kernel": dkernel}, "conv1x1": {"kernel": dkernel1x1}}


def _pointwise(settings: BlockSettings, dtype: Any, kernel: jax.Array) -> jax.Array:
    """The 1x1 kernel as a matrix for every channel group, (1, k, channels / k, features / k).

    Rounded to `dtype`, as the convolution of the plain form does; on GPUs the folded kernel alone
    is rounded.
    """
    kernel = kernel[0, 0]
    if not settings.on_gpu:
        kernel = rounded(kernel, dtype)
    return in_groups(settings, kernel).swapaxes(0, 1)[None]


def _measure(
    settings: BlockSettings,
    x: jax.Array,
    seen: jax.Array,
    y3: jax.Array,
    kernel: jax.Array,
    pointwise: jax.Array,
) -> tuple[Shift, Moments, jax.Array]:
    """The moments of a block's input and of its convolutions' outputs, and CW."""
    count = values_per_channel(y3.shape, settings.image_groups)
    near, mean, covariance = mean_and_covariance(settings, seen)
    product = matmul(covariance, pointwise)
    var1 = flat((pointwise * product).sum(axis=-2))

    shifted3 = y3.astype(mean.dtype)
    near3 = jnp.zeros_like(sums(settings, shifted3))  # varies over the axes that `mean` does
    if settings.shifts(x.dtype):
        # What the 3x3 convolution makes of a constant image, on average over pixels: its mean
        # up to the deviations of x. Near the border some taps see only padding.
        summed = (_share_inside(settings, x, y3)[:, :, None, None] * kernel).sum(axis=(0, 1))
        near3 = apply(near.astype(mean.dtype), in_groups(settings, summed).swapaxes(0, 1)[None])
        shifted3 -= per_image(y3, near3)
    sum3, squares3 = sums_of_two(settings, shifted3, jnp.square(shifted3))
    mean3 = sum3 / count
    var3 = jnp.maximum(squares3 / count - jnp.square(mean3), 0)
    shift = Shift(near3, near.astype(mean.dtype))
    return shift, Moments(mean3, var3, mean, diagonal(covariance), var1), product


def _fold(
    settings: BlockSettings,
    dtype: Any,
    shift: Shift,
    norms: Params,
    pointwise: jax.Array,
    moments: Moments,
) -> tuple[Folded, Statistics]:
    """Folds the block, given the moments; also its three norms' mean and variance.

    The folded kernel is rounded to `dtype`, as the convolution will do, before the bias is
    computed: it then centers what is really computed.
    """
    mean = shift.x + moments.mean
    statistics = {
        "bn3x3": (shift.y3 + moments.mean3, moments.var3),
        "bn1x1": (apply(mean, pointwise, on_gpu=settings.on_gpu), moments.var1),
    }
    if settings.identity:
        statistics["bn_identity"] = (mean, moments.var)
    # Rounding can take a variance of nothing below zero.
    statistics = {norm: (mean, jnp.maximum(var, 0)) for norm, (mean, var) in statistics.items()}
    scale = {
        norm: norms[norm]["scale"][None] * lax.rsqrt(var + settings.epsilon)
        for norm, (_, var) in statistics.items()
    }
    kernel = pointwise * in_groups(settings, scale["bn1x1"])[..., None, :]
    skip = scale.get("bn_identity")
    if skip is not None and settings.on_gpu:  # x is not read once more for it
        kernel, skip = kernel + on_diagonal(settings, skip), None
    kernel = rounded(kernel, dtype)
    bias = -scale["bn3x3"] * moments.mean3
    bias -= apply(moments.mean, kernel, on_gpu=settings.on_gpu)
    for norm in statistics:
        bias += norms[norm]["bias"][None]
    if skip is not None:
        bias -= skip * moments.mean
    return Folded(scale["bn3x3"], kernel, skip, bias), statistics


def _seen(settings: BlockSettings, x: jax.Array) -> jax.Array:
    """The strided input of the 1x1 branch."""
    if settings.stride == 1:
        return x
    # Five computations read these few pixels. Made once they cost less than reading all of x
    # for each, which compilers prefer to do unless there is a barrier.
    return lax.optimization_barrier(x[:, :: settings.stride, :: settings.stride])


def _spread(
    settings: BlockSettings, dy3: jax.Array, kernel: jax.Array, dseen: jax.Array, x: jax.Array
) -> jax.Array:
    """What `dy3` is under the 3x3 convolution's transpose, plus `dseen` where it was seen."""
    if settings.stride == 1:
        return (_transpose(settings, kernel, dy3, x) + dseen).astype(x.dtype)
    if settings.on_gpu:  # the zeros are not written: the sum is attached to what comes after it
        beyond = [(size - 1) % settings.stride for size in x.shape[1:3]]
        spread = [(0, rest, settings.stride - 1) for rest in beyond]
        dseen = lax.pad(dseen, jnp.zeros((), dseen.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
        return (_transpose(settings, kernel, dy3, x) + dseen).astype(x.dtype)
    # Between the pixels of `dseen` would be zeros, in an array as large as x. Instead it goes
    # through the same convolution, beside dy3, by a kernel that is 1 in the middle.
    channels = x.shape[-1] // settings.groups
    one = (
        jnp.zeros((3, 3, channels, channels), x.dtype)
        .at[1, 1]
        .set(jnp.eye(channels, dtype=x.dtype))
    )
    one = jnp.tile(one, settings.groups)
    both = _side_by_side(settings, dy3, dseen.astype(x.dtype))
    return _transpose(settings, _side_by_side(settings, kernel, one), both, x)


def _transpose(
    settings: BlockSettings, kernel: jax.Array, dy: jax.Array, x: jax.Array
) -> jax.Array:
    """The transpose of the 3x3 convolution of `x`."""
    (dx,) = jax.linear_transpose(lambda x: conv3x3(settings, x, kernel), x)(dy)
    return dx


def _side_by_side(settings: BlockSettings, x: jax.Array, y: jax.Array) -> jax.Array:
    """Their last axes joined, every channel group with its own."""
    parts = [a.reshape(*a.shape[:-1], settings.groups, -1) for a in (x, y)]
    return jnp.concatenate(parts, axis=-1).reshape(*x.shape[:-1], -1)


def _share_inside(settings: BlockSettings, x: jax.Array, y3: jax.Array) -> jax.Array:
    """For each tap of the 3x3 kernel the share of output pixels where it sees no padding."""

    def along(axis: int) -> np.ndarray:
        centers = np.arange(y3.shape[axis])[:, None] * settings.stride
        taps = centers + np.array([-1, 0, 1]) * settings.dilation
        return ((taps >= 0) & (taps < x.shape[axis])).mean(axis=0)

    return jnp.asarray(np.outer(along(1), along(2)), wide_type(x.dtype))
