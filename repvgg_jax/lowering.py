"""How the deploy form's 3x3 convolution is computed: plainly, but on CPUs in ways they are good at.

XLA's CPU backend hands convolutions to Eigen, which is slow at three kinds of them. The
substitutes are the same mathematics in float32 and were measured on 2 cores at batch 8
(`benchmarks/infer.py` times whole networks):

    stride 1, one group      Winograd F(2x2, 3x3): 16 multiplications do the work of 36
    stride 1, groups         the same for each group; split groups above 28x28 pixels
    stride 2, one group      a matrix product with the patches, up to 56x56 pixels
    stride 2, groups         one convolution for each group

GPUs and TPUs get the plain convolution, and so do artefacts. `jax.lax.platform_dependent`
chooses when a program is lowered, so programs for several platforms stay right.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

Lowering = Literal["auto", "plain"]

_NHWC = ("NHWC", "HWIO", "NHWC")
# Where the substitutes were measured: channels of a convolution, sides of its input in pixels.
_CHANNELS = 32
_WINOGRAD_SIDES = range(14, 57)
_GROUPED_WINOGRAD_SIDES = range(14, 29)
_PATCHES_SIDES = range(14, 57)


def check(lowering: str) -> None:
    """Raises ValueError for a lowering that does not exist."""
    if lowering not in get_args(Lowering):
        raise ValueError(
            f"lowering={lowering!r} must be one of {', '.join(map(repr, get_args(Lowering)))}"
        )


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    **settings: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, replaced on CPUs where something faster is known.

    For `flax.linen.Conv(conv_general_dilated=…)`. Replaced are float32 convolutions with a 3x3
    kernel, padded by one, without dilation, that are large enough. Arguments, result and
    derivatives are those of the original.

    Args:
      x: (images, height, width, channels).
      kernel: (height, width, channels / groups, features).
      window_strides: of both axes.
      padding: of both axes, low and high.
      rhs_dilation: of the kernel.
      feature_group_count: channel groups.
      **settings: passed on.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides,
            padding,
            rhs_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            **settings,
        )

    usual = (
        x.dtype == kernel.dtype == jnp.float32
        and kernel.shape[:2] == (3, 3)
        and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
        and tuple(rhs_dilation) == (1, 1)
        and window_strides[0] == window_strides[1]
    )
    if not usual:
        return plain(x, kernel)
    fast = _for_cpu(x.shape, kernel.shape, window_strides[0], feature_group_count)
    if fast is None:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=fast, default=plain)


def _for_cpu(
    shape: tuple[int, ...], kernel: tuple[int, ...], stride: int, groups: int
) -> Any | None:
    """What to do instead of the plain convolution, `f(x, kernel)`, or None."""
    sides = set(shape[1:3])
    if kernel[2] < _CHANNELS:
        return None if groups == 1 else _by_group(lambda x, k: _convolution(x, k, stride), groups)
    if stride == 1:
        if groups == 1:
            return winograd if sides <= set(_WINOGRAD_SIDES) else None
        if sides <= set(_GROUPED_WINOGRAD_SIDES):
            return _by_group(winograd, groups)
    elif groups == 1:
        small = stride == 2 and sides <= set(_PATCHES_SIDES)
        return (lambda x, kernel: patches(x, kernel, stride)) if small else None
    return _by_group(lambda x, k: _convolution(x, k, stride), groups)


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1, padded by one, by Winograd's F(2x2, 3x3).

    Four by four input pixels give two by two output pixels: both operands are transformed by
    additions, multiplied element by element over pixels and as matrices over channels, and
    transformed back (Lavin and Gray, 2015, section 4.1).

    Args:
      x: (images, height, width, channels).
      kernel: (3, 3, channels, features).

    Returns:
      (images, height, width, features).
    """
    n, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)  # of tiles
    odd = (2 * rows - height, 2 * columns - width)
    x = jnp.pad(x, ((0, 0), (1, 1 + odd[0]), (1, 1 + odd[1]), (0, 0)))

    # Lists of slices, not one array: the additions then happen in registers.
    across = _to_tiles([x[:, i : i + 2 * rows - 1 : 2] for i in range(4)])
    pixels = [
        _to_tiles([row[:, :, j : j + 2 * columns - 1 : 2] for j in range(4)]) for row in across
    ]
    weights = [_to_taps([row[j] for j in range(3)]) for row in _to_taps([*kernel])]

    products = [
        [(pixels[i][j].reshape(-1, channels) @ weights[i][j]) for j in range(4)] for i in range(4)
    ]
    halves = [_from_tiles(row) for row in products]
    tiles = [_from_tiles([halves[i][j] for i in range(4)]) for j in range(2)]  # [column][row]
    shape = (n, rows, columns, kernel.shape[-1])
    y = jnp.stack(
        [jnp.stack([tiles[j][i].reshape(shape) for j in range(2)], axis=3) for i in range(2)],
        axis=2,
    )
    return y.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width]


def patches(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 3x3 convolution padded by one, as one matrix product with every output's patch.

    Args:
      x: (images, height, width, channels).
      kernel: (3, 3, channels, features).
      stride: of both axes.

    Returns:
      (images, height / stride, width / stride, features), sides rounded up.
    """
    height, width = (-(-side // stride) for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    ends = stride * (height - 1) + 1, stride * (width - 1) + 1
    taps = [
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in range(3) for j in range(3)
    ]
    matrix = jnp.concatenate(taps, axis=-1).reshape(-1, 9 * x.shape[-1])
    y = matrix @ kernel.reshape(matrix.shape[-1], -1)
    return y.reshape(x.shape[0], height, width, -1)


def _by_group(convolution: Any, groups: int) -> Any:
    """Gives every channel group its own convolution."""

    def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
        inputs, kernels = jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1)
        return jnp.concatenate(list(map(convolution, inputs, kernels)), axis=-1)

    return split


def _convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    pad = (1, 1)
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=_NHWC
    )


def _to_tiles(d: list[jax.Array]) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _to_taps(g: list[jax.Array]) -> list[jax.Array]:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _from_tiles(m: list[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
