"""Operations of the covariance form.

Feature maps are (images, height, width, channels). Small arrays are (G, channels), or a matrix
per group, (G, k, in / k, out / k), for G groups of images and k groups of channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.batch_stats import per_image, values_per_channel
from repvgg_jax.meshes import Convolution, grouped_convolution

Params = Mapping[str, Mapping[str, jax.Array]]
Statistics = dict[str, tuple[jax.Array, jax.Array]]
Activation = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What is fixed about a block.

    Attributes:
      stride: spatial stride.
      dilation: dilation of the 3x3 kernel, which is padded by as much.
      groups: channel groups of both convolutions, k below.
      identity: whether there is an identity branch.
      activation: applied to the result; None for none.
      image_groups: parts of the batch, in order, with statistics of their own, G below.
      epsilon: added to the variances.
      on_gpu: arranged for GPUs, where every product and convolution writes its result to the main
        memory, instead of for TPUs, where what comes after a convolution is attached to it.
      pallas: on NVIDIA GPUs, with a kernel for the gradient of x (`pallas_gpu.py`).
    """

    stride: int
    dilation: int
    groups: int
    identity: bool
    activation: Activation | None
    image_groups: int
    epsilon: float
    on_gpu: bool = False
    pallas: bool = False

    @property
    def relu(self) -> bool:
        """Whether the activation is ReLU, whose derivative the passes here contain."""
        return self.activation is jax.nn.relu

    def shifts(self, dtype: Any) -> bool:
        """Whether values are taken relative to something near their mean before they are squared.

        Not on GPUs in 16 bits, where what is subtracted would cost a copy of x. A variance then
        loses what float32 sums lose, times the squared ratio of mean and deviation; at ratios
        above 200, the rounding of x itself is larger.
        """
        return not self.on_gpu or jnp.finfo(dtype).bits > 16


def on_gpus(compute: Callable[..., Any], settings: BlockSettings, *args: Any) -> Any:
    """`compute(settings, *args)`, whose `on_gpu` is chosen when the program is lowered."""
    gpu = functools.partial(compute, dataclasses.replace(settings, on_gpu=True))
    other = functools.partial(compute, settings)
    return lax.platform_dependent(*args, cuda=gpu, rocm=gpu, default=other)


def conv3x3(settings: BlockSettings, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """The block's 3x3 convolution; `options` are those of `lax.conv_general_dilated`."""
    pad = (settings.dilation, settings.dilation)
    convolve: Convolution = functools.partial(
        lax.conv_general_dilated,
        window_strides=(settings.stride, settings.stride),
        padding=(pad, pad),
        rhs_dilation=(settings.dilation, settings.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=settings.groups,
        **options,
    )
    return grouped_convolution(convolve, x, kernel)


def conv1x1(
    x: jax.Array, kernels: jax.Array, dtype: Any = None, *, on_gpu: bool = False
) -> jax.Array:
    """Every image group of `x` through its own 1x1 kernel (G, k, in / k, out / k).

    The result is in `dtype`, that of `x` if None.
    """
    image_groups, groups, _, _ = kernels.shape
    kernels = kernels.astype(x.dtype)
    if on_gpu and image_groups == groups == 1:  # no transposed copy of the kernel
        return lax.dot_general(x, kernels[0, 0], (((3,), (0,)), ((), ())))
    if image_groups == 1:  # a convolution, whose layout in memory the compiler may choose
        kernel = kernels[0].swapaxes(0, 1).reshape(1, 1, kernels.shape[2], -1)
        convolve = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            preferred_element_type=dtype,
        )
        return grouped_convolution(convolve, x, kernel)
    n, h, w, _ = x.shape
    parts = x.reshape(image_groups, -1, h, w, groups, kernels.shape[2])
    out = jnp.einsum("gnhwki,gkio->gnhwko", parts, kernels, preferred_element_type=dtype)
    return out.reshape(n, h, w, -1)


def conv1x1_of_two(
    settings: BlockSettings, x: jax.Array, x_kernels: jax.Array, y: jax.Array, y_kernels: jax.Array
) -> jax.Array:
    """The sum of `conv1x1` of `x` and of `y`, of equal shapes but for their channels."""
    if settings.groups > 1 or settings.on_gpu:
        on_gpu = settings.on_gpu
        return conv1x1(x, x_kernels, on_gpu=on_gpu) + conv1x1(y, y_kernels, on_gpu=on_gpu)
    # Side by side they are one convolution, to which XLA for TPUs attaches what comes after it;
    # the output of a second one would go through memory.
    both = jnp.concatenate([x, y], axis=-1)
    return conv1x1(both, jnp.concatenate([x_kernels, y_kernels], axis=-2))


def outer(settings: BlockSettings, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums of x y' over the images and pixels of every group, (G, k, x's / k, y's / k)."""
    wide = wide_type(x.dtype)
    # The default matmul precision on accelerators is below float32.
    precision = "highest" if x.dtype == wide else None
    x, y = (
        a.reshape(
            settings.image_groups,
            -1,
            *a.shape[1:3],
            settings.groups,
            a.shape[-1] // settings.groups,
        )
        for a in (x, y)
    )
    return jnp.einsum("gnhwki,gnhwko->gkio", x, y, precision=precision, preferred_element_type=wide)


def sums(settings: BlockSettings, x: jax.Array) -> jax.Array:
    """Sums over the images and pixels of every group, (G, channels)."""
    x = x.astype(wide_type(x.dtype))
    if settings.on_gpu and settings.image_groups == 1:
        return x.sum(axis=(0, 1, 2))[None]
    sums = x.sum(axis=(1, 2))
    return sums.reshape(settings.image_groups, -1, x.shape[-1]).sum(axis=1)


def sums_of_two(settings: BlockSettings, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sums` of `x` and of `y`, of equal shape; on GPUs in the same kernels."""
    if not settings.on_gpu:
        return sums(settings, x), sums(settings, y)
    x, y = (a.astype(wide_type(a.dtype)) for a in (x, y))
    # As one sum of complex numbers: XLA attaches it to what computes x. It does not attach a sum of
    # pairs, for which it takes x to be read twice.
    both = sums(settings, lax.complex(x, y))
    return both.real, both.imag


def mean_and_covariance(
    settings: BlockSettings, seen: jax.Array, columns: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A constant near the mean, the mean relative to it, and the covariance.

    Where `columns` pixels lie side by side on the last axis, they are so many values of each
    channel.
    """
    channels = seen.shape[-1] // columns
    count = values_per_channel(seen.shape, settings.image_groups) * columns
    mean = sums(settings, seen).reshape(-1, columns, channels).sum(axis=1) / count
    near = jnp.zeros_like(mean, dtype=seen.dtype)
    if settings.shifts(seen.dtype):
        # In the convolutions' dtype, so that subtracting it from x loses nothing more.
        near = lax.stop_gradient(mean.astype(seen.dtype))
        seen -= per_image(seen, jnp.tile(near, columns))
        mean -= near
    products = jnp.split(outer(settings, seen, seen), columns, axis=-2)
    # Those of a column with itself lie on the diagonal.
    own = [jnp.split(row, columns, axis=-1)[i] for i, row in enumerate(products)]
    return near, mean, sum(own[1:], own[0]) / count - outer_small(settings, mean, mean)


def wide_type(dtype: Any) -> Any:
    """What sums and statistics are computed in."""
    return jnp.promote_types(dtype, jnp.float32)


def apply(x: jax.Array, matrices: jax.Array, *, on_gpu: bool = False) -> jax.Array:
    """Every group's x'M, (G, out)."""
    groups = matrices.shape[1]
    if on_gpu:  # as a sum, which is attached to what is around it
        return flat((x.reshape(x.shape[0], groups, -1, 1) * matrices).sum(axis=-2))
    x = x.reshape(x.shape[0], groups, 1, -1)
    return flat(matmul(x, matrices))


def less_apply(
    settings: BlockSettings, base: jax.Array, x: jax.Array, matrices: jax.Array
) -> jax.Array:
    """`base` less every group's x'M, (G, out)."""
    if not settings.on_gpu:
        return base - apply(x, matrices)
    # Within the sum, or it would be a kernel of its own.
    share = in_groups(settings, base / matrices.shape[2])[..., None, :]
    return flat((share - in_groups(settings, x)[..., None] * matrices).sum(axis=-2))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix products in full precision; the default on accelerators is below float32."""
    return jnp.matmul(x, y, precision="highest")


def outer_small(settings: BlockSettings, x: jax.Array, y: jax.Array) -> jax.Array:
    """Every group's x y'."""
    return in_groups(settings, x)[..., :, None] * in_groups(settings, y)[..., None, :]


def in_groups(settings: BlockSettings, x: jax.Array) -> jax.Array:
    """Splits the last axis into channel groups, (…, k, channels / k)."""
    return x.reshape(*x.shape[:-1], settings.groups, -1)


def diagonal(matrices: jax.Array) -> jax.Array:
    """Every group's diagonal, (G, channels)."""
    # A sum, which compilers attach to what is around it; `jnp.diagonal` gathers and scatters.
    on_it = jnp.eye(matrices.shape[-1], dtype=bool)
    return flat(jnp.where(on_it, matrices, 0).sum(axis=-1))


def on_diagonal(settings: BlockSettings, values: jax.Array) -> jax.Array:
    """Every group's diagonal matrix of (G, channels)."""
    on_it = jnp.eye(values.shape[-1] // settings.groups, dtype=bool)
    return jnp.where(on_it, in_groups(settings, values)[..., None], 0)


def flat(x: jax.Array) -> jax.Array:
    """All axes after the first as one."""
    return x.reshape(x.shape[0], -1)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds to the values of `dtype` without changing the type; differentiates as x."""
    if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    # Not two conversions, which the compiler may drop.
    info = jnp.finfo(dtype)
    return x + lax.stop_gradient(lax.reduce_precision(x, info.nexp, info.nmant) - x)
