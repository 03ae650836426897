"""The kernel of any linear layer, read off its response to unit impulses."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.algebra import Affine


def fuse_linear(
    function: Callable[[jax.Array], jax.Array],
    *,
    in_channels: int,
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
        activation. The stride is found.
      in_channels: channels of its input.
      max_kernel: largest kernel to look for, in pixels; the computation grows with it.
      dtype: in which `function` is called.
      tolerance: largest error allowed on the random images, relative to the largest output
        without the bias. Some rounding errors of `dtype` are allowed on top.

    Returns:
      NumPy arrays: a kernel (height, width, in_channels, features), with zeros where channel
      groups do not mix, and a bias (features,). Padding is half the kernel, zeros.

    Raises:
      ValueError: the function is not affine, or depends on the position, or its kernel is
        larger than `max_kernel`, or it treats borders unlike a zero-padded convolution.
    """
    reach = max_kernel // 2
    size = 4 * max(reach, 1) + 4

    def run(x: np.ndarray) -> np.ndarray:
        return np.asarray(function(jnp.asarray(x, dtype)), np.float64)

    at_zero = run(np.zeros((1, size, size, in_channels)))
    if at_zero.ndim != 4 or size % at_zero.shape[1] or at_zero.shape[1] != at_zero.shape[2]:
        raise ValueError(
            f"images of {size}x{size} pixels give an output of shape {at_zero.shape}; expected "
            f"(images, height / stride, width / stride, features) with a stride that divides {size}"
        )
    stride = size // at_zero.shape[1]
    middle = at_zero.shape[1] // 2
    bias = at_zero[0, middle, middle]
    center = middle * stride
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1, in_channels, bias.size))
    # An impulse at distance d from a pixel under an output shows one tap per output pixel.
    for row, column in itertools.product(range(stride), range(stride)):
        images = np.zeros((in_channels, size, size, in_channels))
        channels = np.arange(in_channels)
        images[channels, center + row, center + column, channels] = 1
        response = run(images) - at_zero
        for y, x in itertools.product(range(-reach, reach + 1), repeat=2):
            if (y - row) % stride or (x - column) % stride:
                continue
            out_y, out_x = middle - (y - row) // stride, middle - (x - column) // stride
            kernel[y + reach, x + reach] = response[:, out_y, out_x]
    kernel = _trimmed(kernel)
    rounding = 8 * float(jnp.finfo(dtype).eps)
    _check(run, kernel, bias, stride, size, in_channels, tolerance, rounding)
    return Affine(kernel.astype(np.dtype(dtype)), bias.astype(np.dtype(dtype)))


def _trimmed(kernel: np.ndarray) -> np.ndarray:
    """Without outer rows and columns that are zero up to rounding."""
    small = np.abs(kernel).max() * 1e-6
    while kernel.shape[0] > 1 and np.abs(kernel[[0, -1]]).max() <= small:
        kernel = kernel[1:-1]
    while kernel.shape[1] > 1 and np.abs(kernel[:, [0, -1]]).max() <= small:
        kernel = kernel[:, 1:-1]
    return kernel


def _check(
    run: Callable[[np.ndarray], np.ndarray],
    kernel: np.ndarray,
    bias: np.ndarray,
    stride: int,
    size: int,
    in_channels: int,
    tolerance: float,
    rounding: float,
) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 1, size, size, in_channels))
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
    expected = _convolve(first[0], kernel, stride) + bias
    error = np.abs(found[0] - expected) / scale
    border = max(kernel.shape[:2]) // 2 // stride + 1
    inside = error[border:-border, border:-border]
    if inside.max() > tolerance:
        raise ValueError(
            "the function is not a convolution with a kernel of at most "
            f"{kernel.shape[0]}x{kernel.shape[1]} pixels: on random images it differs by "
            f"{inside.max():.1e} of its largest output, {tolerance:.1e} is allowed; it depends on "
            "the position, or max_kernel is too small"
        )
    if error.max() > tolerance:
        raise ValueError(
            "the function is a convolution inside images but not at their borders, where it "
            f"differs by {error.max():.1e} of its largest output: an inner layer with a bias must "
            "be padded with its response to zero"
        )


def _convolve(image: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    height, width = kernel.shape[:2]
    pad = ((height // 2, height // 2), (width // 2, width // 2), (0, 0))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, pad), (height, width), (0, 1))
    return np.einsum("yxihw,hwio->yxo", windows[::stride, ::stride], kernel)
