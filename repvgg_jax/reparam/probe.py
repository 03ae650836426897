"""The kernel of any linear layer, read off its response to unit impulses."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.algebra import Affine
from repvgg_jax.text import plural, positive_integer


def fuse_linear(
    function: Callable[[jax.Array], jax.Array],
    *,
    in_channels: int,
    spatial_dims: int = 2,
    max_kernel: int = 15,
    dtype: Any = jnp.float32,
    tolerance: float = 1e-5,
) -> Affine:
    """The one convolution that computes `function`.

    No formula and no parameter name is used: an affine, shift-equivariant function is determined
    by its response to zero and to unit impulses. The result is checked on random images.

    Args:
      function: maps (images, height, width, in_channels) to (images, height / stride,
        width / stride, features), e.g. `lambda x: block.apply(variables, x)` of a block without
        activation. The stride is found. Transposed convolutions give a multiple of the size.
      in_channels: channels of its input.
      spatial_dims: axes between images and channels: 1 for sequences, 3 for volumes.
      max_kernel: largest kernel to look for, in pixels (of the output, where that is the larger
        one); the computation grows with it.
      dtype: in which `function` is called.
      tolerance: largest error allowed on the random images, relative to the largest output
        without the bias. Some rounding errors of `dtype` are allowed on top.

    Returns:
      NumPy arrays: a kernel (height, width, in_channels, features), with zeros where channel
      groups do not mix, and a bias (features,). Padding is half the kernel, zeros. For a function
      that gives `s` times the size, they are those of `jax.lax.conv_general_dilated` with
      `lhs_dilation=s` and padding `(k // 2, k // 2 + s - 1)`.

    Raises:
      ValueError: the function is not affine, or depends on the position, or its kernel is
        larger than `max_kernel`, or it treats borders unlike a zero-padded convolution; or an
        argument is not a number that is allowed.
    """
    numbers = {"in_channels": in_channels, "spatial_dims": spatial_dims, "max_kernel": max_kernel}
    for name, number in numbers.items():
        positive_integer("fuse_linear", name, number)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"fuse_linear: dtype={dtype} must be a floating point type")
    if not tolerance >= 0:
        raise ValueError(f"fuse_linear: tolerance={tolerance} must be 0 or more")
    reach = max_kernel // 2
    size = 4 * max(reach, 1) + 4
    image = (size,) * spatial_dims
    # Needed inside of a trace only, and slow: Flax then draws initial parameters for every layer.
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    evaluated = jax.ensure_compile_time_eval if traced else contextlib.nullcontext

    def run(x: np.ndarray) -> np.ndarray:
        with evaluated():
            y = function(jnp.asarray(x, dtype))
        if isinstance(y, jax.core.Tracer):
            raise ValueError(
                "fuse_linear reads values, but the function uses arrays that are being traced; "
                "call it outside of jax.jit, or fuse_params inside"
            )
        if not isinstance(y, (jax.Array, np.ndarray)) or not jnp.issubdtype(y.dtype, jnp.floating):
            raise ValueError(
                f"the function gives {getattr(y, 'dtype', type(y).__name__)}, expected one array "
                "of floating point numbers"
            )
        if y.shape[:1] != (len(x),):
            raise ValueError(
                f"the function gives an output of shape {y.shape} for {plural(len(x), 'image')}, "
                "expected one for each image"
            )
        return np.asarray(y, np.float64)

    at_zero = run(np.zeros((1, *image, in_channels)))
    out = at_zero.shape[1] if at_zero.ndim == spatial_dims + 2 else 0
    whole = out and (size % out == 0 or out % size == 0)
    if not whole or at_zero.shape[1:-1] != (out,) * spatial_dims:
        raise ValueError(
            f"images of {'x'.join(map(str, image))} pixels give an output of shape "
            f"{at_zero.shape}; expected (images, height / stride, width / stride, features) with "
            f"{spatial_dims} axes between images and features, and a stride that divides {size} or "
            "a multiple of the size"
        )
    stride, up = max(1, size // out), max(1, out // size)
    center = out // 2 // up * stride
    middle = center * up // stride
    bias = at_zero[(0, *(middle,) * spatial_dims)]
    taps = range(-reach, reach + 1)
    if middle + (reach + stride - 1) // stride >= out:  # the outermost tap would show outside
        raise ValueError(
            f"the function gives {out} of {size} pixels: it is no convolution, or "
            f"max_kernel={max_kernel} is too small for its stride"
        )
    kernel = np.zeros((*(len(taps),) * spatial_dims, in_channels, bias.size))
    channels = np.arange(in_channels)
    # An impulse at distance d from a pixel under an output shows one tap per output pixel.
    for shift in itertools.product(range(stride), repeat=spatial_dims):
        images = np.zeros((in_channels, *image, in_channels))
        images[(channels, *(center + d for d in shift), channels)] = 1
        response = run(images) - at_zero
        for tap in itertools.product(taps, repeat=spatial_dims):
            if any((t - d) % stride for t, d in zip(tap, shift, strict=True)):
                continue
            where = (middle - (t - d) // stride for t, d in zip(tap, shift, strict=True))
            kernel[tuple(t + reach for t in tap)] = response[(slice(None), *where)]
    kernel = _trimmed(kernel, spatial_dims)
    rounding = 8 * float(jnp.finfo(dtype).eps)
    _check(run, Affine(kernel, bias), (stride, up), (*image, in_channels), tolerance, rounding)
    return Affine(kernel.astype(np.dtype(dtype)), bias.astype(np.dtype(dtype)))


def _trimmed(kernel: np.ndarray, spatial_dims: int) -> np.ndarray:
    """Removes outer taps that are zero up to rounding."""
    small = np.abs(kernel).max() * 1e-6
    for axis in range(spatial_dims):
        while kernel.shape[axis] > 1 and np.abs(kernel.take([0, -1], axis)).max() <= small:
            kernel = kernel.take(range(1, kernel.shape[axis] - 1), axis)
    return kernel


def _check(
    run: Callable[[np.ndarray], np.ndarray],
    found_map: Affine,
    strides: tuple[int, int],
    shape: tuple[int, ...],
    tolerance: float,
    rounding: float,
) -> None:
    kernel, bias = found_map
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 1, *shape))
    found = run(np.concatenate([first, second, first - 2 * second]))
    zero = run(np.zeros_like(first))[0]
    if not np.isfinite(found).all():
        raise ValueError("the function gives NaN or infinity on random images")
    # A large bias must not hide an activation behind it.
    scale = max(np.abs(found - zero).max(), np.finfo(np.float64).tiny)
    tolerance += rounding * np.abs(found).max() / scale
    combined = found[0] - 2 * found[1] + 2 * zero
    if (error := np.abs(found[2] - combined).max() / scale) > tolerance:
        raise ValueError(
            f"the function is not affine: f(a - 2b) differs from f(a) - 2 f(b) + 2 f(0) by "
            f"{error:.1e} of its largest output, {tolerance:.1e} is allowed; leave out the "
            "activation, and use running statistics"
        )
    expected = _convolve(first[0], kernel, *strides) + bias
    error = np.abs(found[0] - expected) / scale
    sides = kernel.shape[:-2]
    border = max(sides) // 2 // strides[0] + 1
    inside = error[(slice(border, -border),) * len(sides)]
    if inside.max() > tolerance:
        raise ValueError(
            "the function is not a convolution with a kernel of at most "
            f"{'x'.join(map(str, sides))} pixels: on random images it differs by "
            f"{inside.max():.1e} of its largest output, {tolerance:.1e} is allowed; it depends on "
            "the position, or max_kernel is too small"
        )
    if error.max() > tolerance:
        raise ValueError(
            "the function is a convolution inside images but not at their borders, where it "
            f"differs by {error.max():.1e} of its largest output: an inner layer with a bias must "
            "be padded with its response to zero"
        )


def _convolve(image: np.ndarray, kernel: np.ndarray, stride: int, up: int) -> np.ndarray:
    """A convolution of one image (…, channels), with `up - 1` zeros between its pixels."""
    sides = kernel.shape[:-2]
    size = [side * up for side in image.shape[:-1]]
    spread = np.zeros((*size, image.shape[-1]))
    spread[(slice(None, None, up),) * len(sides)] = image
    spread = np.pad(spread, [*((side // 2, side // 2) for side in sides), (0, 0)])
    total = np.zeros(())
    for tap in np.ndindex(*sides):
        window = (slice(t, t + s, stride) for t, s in zip(tap, size, strict=True))
        total = total + spread[tuple(window)] @ kernel[tap]
    return total
