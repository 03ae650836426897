"""How convolutions are computed: plainly, but on CPUs in ways they are good at.

XLA's CPU backend hands convolutions to Eigen, which is slow at some kinds of them. The
substitutes are the same mathematics in float32. The deploy form's, measured on 2 cores at
batch 8 (`benchmarks/infer.py` times whole networks):

    1x1, one group           a matrix product, after a slice at stride 2
    stride 1, one group      Winograd F(2x2, 3x3): 16 multiplications do the work of 36
    stride 1, dilated        the same for the pixels of every remainder by the dilation
    stride 1, groups         the same for each group; split groups above 28x28 pixels
    stride 2, one group      a matrix product with the patches, up to 56x56 pixels
    stride 2, groups         one convolution for each group
    a group per channel      a sum of shifted products, for any kernel, stride and dilation

In training a kernel's gradient counts too, and Eigen is slowest at it. The training form's,
measured on 2 cores at batch 32 (`benchmarks/train_step.py`), all differentiated as written:

    1x1, one group           a matrix product, after a slice at stride 2
    stride 1, one group      Winograd, whose derivative is Winograd's too
    stride 2, one group      a matrix product with the patches, at 14x14 pixels and more
    a group per channel      a sum of shifted products

The tables are of two processors. With `lowering="measured"` the deploy form's choice is timed on
this machine (`repvgg_jax.cpu_measured`).

GPUs and TPUs get the plain convolution, and so do artifacts; in channel groups, several GPUs get
it as `repvgg_jax.meshes.grouped_convolution` does it. `jax.lax.platform_dependent`
chooses when a program is lowered, so programs for several platforms stay right.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from repvgg_jax import cpu_measured
from repvgg_jax.meshes import Convolution, grouped_convolution, on_auto_axes

Lowering = Literal["auto", "measured", "plain"]

NAME = "repvgg_jax_convolution"
"""The `checkpoint_name` of the results of training convolutions."""

_NHWC = ("NHWC", "HWIO", "NHWC")
# Where the substitutes were measured: channels of a convolution, most groups of channels that gain
# from convolutions of their own, sides of its input in pixels.
_CHANNELS = 32
_GROUPS = 64
_WINOGRAD_SIDES = range(14, 57)
_GROUPED_WINOGRAD_SIDES = range(14, 29)
_DILATED_WINOGRAD_SIDES = range(9, 57)  # divided by the dilation
_PATCHES_SIDES = range(14, 57)
# Taps of a kernel of one channel in one loop. The gradient of that loop needs memory for each.
_TAPS, _TRAINING_TAPS = 49, 9


def check(lowering: str) -> None:
    """Raises ValueError for a lowering that does not exist."""
    if lowering not in get_args(Lowering):
        raise ValueError(
            f"lowering={lowering!r} must be one of {', '.join(map(repr, get_args(Lowering)))}"
        )


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Any, **settings: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, replaced on CPUs where something faster is known.

    For `flax.linen.Conv(conv_general_dilated=…)` in inference. Replaced are float32
    convolutions with a 3x3 kernel, padded by as much as they are dilated, that are large enough,
    1x1 convolutions, and depthwise ones of any kind, these in float64, too.
    Arguments, result and derivatives are those of the original.

    Args:
      x: (images, height, width, channels).
      kernel: (height, width, channels / groups, features).
      window_strides: of both axes.
      padding: of both axes, low and high.
      **settings: the original's, among them `rhs_dilation` and `feature_group_count`.
    """
    return _replaced(_for_inference, x, kernel, window_strides, padding, settings)


def measured_conv_general_dilated(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Any, **settings: Any
) -> jax.Array:
    """`conv_general_dilated` in the way that is fastest on this CPU, which is timed once."""
    return _replaced(_by_time, x, kernel, window_strides, padding, settings)


def training_conv_general_dilated(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Any, **settings: Any
) -> jax.Array:
    """`conv_general_dilated` for training, where the derivative counts too.

    The result has the name `NAME`, by which policies of `jax.checkpoint` may keep it.
    """
    y = _replaced(_for_training, x, kernel, window_strides, padding, settings, taps=_TRAINING_TAPS)
    return checkpoint_name(y, NAME)


def _replaced(
    choose: Callable[..., Convolution | None],
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    settings: dict[str, Any],
    taps: int = _TAPS,
) -> jax.Array:
    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **settings)

    fast: Convolution | None = None
    if _is_known(x, kernel, padding, settings):
        dilation = settings.get("rhs_dilation") or (1, 1)
        groups = settings.get("feature_group_count", 1)
        pad = kernel.shape[0] // 2 * dilation[0]
        usual = (
            x.dtype == jnp.float32
            and kernel.shape[:2] in ((1, 1), (3, 3))
            and tuple(map(tuple, padding)) == ((pad, pad), (pad, pad))
            and dilation[0] == dilation[1]
            and window_strides[0] == window_strides[1]
        )
        if _is_depthwise(x, kernel, padding, dilation, groups):
            fast = functools.partial(
                depthwise,
                strides=window_strides,
                padding=padding,
                dilation=dilation,
                taps=taps,
            )
        elif usual:
            fast = choose(x.shape, kernel.shape, window_strides[0], groups, dilation[0])

    def compute(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return grouped_convolution(plain, x, kernel, cpu=fast)

    return compute(x, kernel) if fast is None else on_auto_axes(compute, x, kernel)


def _is_known(x: jax.Array, kernel: jax.Array, padding: Any, settings: dict[str, Any]) -> bool:
    """Whether a convolution is of the kind that blocks have; others stay plain."""
    between = settings.get("lhs_dilation")
    return (
        x.ndim == 4
        and x.dtype == kernel.dtype
        and settings.get("preferred_element_type") in (None, x.dtype)
        and (between is None or set(between) == {1})
        and not isinstance(padding, str)
    )


def _is_depthwise(
    x: jax.Array, kernel: jax.Array, padding: Any, dilation: Sequence[int], groups: int
) -> bool:
    """Whether every channel has a filter of its own, and `depthwise` is as exact."""
    rows_and_columns = zip(x.shape[1:3], kernel.shape[:2], padding, dilation, strict=True)
    rest = [side + sum(pads) - d * (size - 1) for side, size, pads, d in rows_and_columns]
    return (
        x.dtype in (jnp.float32, jnp.float64)
        and x.shape[-1] == kernel.shape[-1] == groups > 1
        and min(itertools.chain.from_iterable(padding)) >= 0
        and all(map(_is_positive, rest))  # a kernel larger than its input has no outputs
    )


def _is_positive(size: Any) -> bool:
    """Whether a size is above zero; of symbols, whether it always is."""
    try:
        return size > 0
    except jax.errors.InconclusiveDimensionOperation:
        return False


def _for_inference(
    shape: tuple[int, ...], kernel: tuple[int, ...], stride: int, groups: int, dilation: int
) -> Convolution | None:
    """What to do in the deploy form instead of the plain convolution, if anything."""
    sides = set(shape[1:3])
    if dilation > 1 and kernel[0] == 3:
        apart = {-(-side // dilation) for side in sides} <= set(_DILATED_WINOGRAD_SIDES)
        if stride == groups == 1 and kernel[2] >= _CHANNELS and apart:
            return lambda x, kernel: dilated(winograd, x, kernel, dilation)
        return None
    if kernel[0] == 1:
        return (lambda x, kernel: pointwise(x, kernel, stride)) if groups == 1 else None
    if kernel[2] == 1 or groups > _GROUPS:
        return None  # many convolutions take long to compile and to run
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


def _by_time(
    shape: tuple[int, ...], kernel: tuple[int, ...], stride: int, groups: int, dilation: int
) -> Convolution | None:
    """The fastest of what is possible, where the table has a choice or could have one."""
    usual = _for_inference(shape, kernel, stride, groups, dilation)
    few = kernel[0] == 1 or dilation > 1 or kernel[2] < _CHANNELS or groups > _GROUPS
    if few or 0 in shape or jax.default_backend() != "cpu":
        return usual
    candidates: dict[str, Convolution] = {"plain": lambda x, k: _convolution(x, k, stride, groups)}
    ways = {"patches": lambda x, k: patches(x, k, stride)}
    if stride == 1:
        ways["winograd"] = winograd
    if groups > 1:
        ways["convolution"] = lambda x, k: _convolution(x, k, stride)
    for name, way in ways.items():
        candidates[name] = way if groups == 1 else _by_group(way, groups)
    if usual is not None:
        candidates["usual"] = usual
    key = f"{'x'.join(map(str, shape))} to {kernel[3]}, stride {stride}, {groups} groups"
    name = cpu_measured.fastest(
        key, candidates, "plain" if usual is None else "usual", (shape, kernel)
    )
    return None if name == "plain" else candidates[name]


def _for_training(
    shape: tuple[int, ...], kernel: tuple[int, ...], stride: int, groups: int, dilation: int
) -> Convolution | None:
    """What to do in the training form instead of the plain convolution, if anything."""
    if groups > 1 or (dilation > 1 and kernel[0] > 1):
        return None
    if kernel[0] == 1:
        return lambda x, kernel: pointwise(x, kernel, stride)
    sides = set(shape[1:3])
    if stride == 1:
        return winograd if kernel[2] >= _CHANNELS and sides <= set(_WINOGRAD_SIDES) else None
    large = stride == 2 and min(sides) >= _PATCHES_SIDES.start
    return (lambda x, kernel: patches(x, kernel, stride)) if large else None


def pointwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 1x1 convolution as a matrix product.

    Args:
      x: (images, height, width, channels).
      kernel: (1, 1, channels, features).
      stride: of both axes.

    Returns:
      (images, height / stride, width / stride, features), sides rounded up.
    """
    return x[:, ::stride, ::stride] @ kernel[0, 0]


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
    # Even and odd rows and columns apart: neighboring tiles then overlap in whole slices, in
    # the derivative too.
    x = x.reshape(n, rows + 1, 2, columns + 1, 2, channels).transpose(2, 4, 0, 1, 3, 5)

    def pixel(i: int, j: int) -> jax.Array:
        """The pixel (i, j) of every tile."""
        return x[i % 2, j % 2, :, i // 2 : i // 2 + rows, j // 2 : j // 2 + columns]

    # Lists of slices, not one array: the additions then happen in registers.
    across = [_to_tiles([pixel(i, j) for i in range(4)]) for j in range(4)]
    pixels = [_to_tiles([column[i] for column in across]) for i in range(4)]
    weights = [_to_taps([row[j] for j in range(3)]) for row in _to_taps([*kernel])]

    products = [
        [(pixels[i][j].reshape(n * rows * columns, channels) @ weights[i][j]) for j in range(4)]
        for i in range(4)
    ]
    halves = [_from_tiles(row) for row in products]
    tiles = [_from_tiles([halves[i][j] for i in range(4)]) for j in range(2)]  # [column][row]
    shape = (n, rows, columns, kernel.shape[-1])
    y = jnp.stack(
        [jnp.stack([tiles[j][i].reshape(shape) for j in range(2)], axis=3) for i in range(2)],
        axis=2,
    )
    # No -1 in any shape: a batch may be empty.
    return y.reshape(n, 2 * rows, 2 * columns, kernel.shape[-1])[:, :height, :width]


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
    outputs, features = x.shape[0] * height * width, kernel.shape[-1]
    matrix = jnp.concatenate(taps, axis=-1).reshape(outputs, 9 * x.shape[-1])
    y = matrix @ kernel.reshape(matrix.shape[-1], features)
    return y.reshape(x.shape[0], height, width, features)


def dilated(convolution: Convolution, x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """A dilated 3x3 convolution, padded by the dilation, as one that is not, padded by one.

    Pixels whose rows and columns leave the same remainders when divided by the dilation see only
    each other; they become images of their own.

    Args:
      convolution: 3x3, of stride 1, padded by one.
      x: (images, height, width, channels).
      kernel: (3, 3, channels, features).
      dilation: of both axes.

    Returns:
      (images, height, width, features).
    """
    n, height, width, channels = x.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    beyond = rows * dilation - height, columns * dilation - width
    x = jnp.pad(x, ((0, 0), (0, beyond[0]), (0, beyond[1]), (0, 0)))
    x = x.reshape(n, rows, dilation, columns, dilation, channels).transpose(2, 4, 0, 1, 3, 5)
    y = convolution(x.reshape(dilation**2 * n, rows, columns, channels), kernel)
    y = y.reshape(dilation, dilation, n, rows, columns, kernel.shape[-1])
    y = y.transpose(2, 3, 0, 4, 1, 5)
    y = y.reshape(n, rows * dilation, columns * dilation, kernel.shape[-1])
    return y[:, :height, :width]


def depthwise(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int],
    padding: Sequence[Sequence[int]],
    dilation: Sequence[int],
    taps: int,
) -> jax.Array:
    """A convolution of every channel on its own, as a sum of shifted products.

    XLA fuses the taps of small kernels into one loop over the output. Larger ones are computed one
    row at a time, and so is their gradient.

    Args:
      x: (images, height, width, channels).
      kernel: (height, width, 1, channels).
      strides: of both axes.
      padding: of both axes, low and high.
      dilation: of both axes.
      taps: the most that a small kernel has.

    Returns:
      (images, rows, columns, channels).
    """
    rows, columns = kernel.shape[:2]
    kernel = jnp.asarray(kernel)[:, :, None, None]  # each tap broadcasts over images and pixels
    x = jnp.pad(x, ((0, 0), *map(tuple, padding), (0, 0)))
    x = lax.optimization_barrier(x)  # else the loop asks of every tap whether it is a border
    # The last pixel that a tap reads, counted from its first one, and one more.
    ends = [
        (side - d * (size - 1) - 1) // stride * stride + 1
        for side, size, stride, d in zip(
            x.shape[1:3], (rows, columns), strides, dilation, strict=True
        )
    ]

    def row(x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The taps of one row: pixels (images, ends[0], width, channels), a kernel of one row."""

        def tap(j: int) -> jax.Array:
            first = j * dilation[1]
            return x[:, :: strides[0], first : first + ends[1] : strides[1]] * kernel[j]

        return sum(map(tap, range(1, columns)), tap(0))

    def pixels(i: int | jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i * dilation[0], ends[0], axis=1)

    y = row(pixels(0), kernel[0])
    if rows * columns <= taps:
        for i in range(1, rows):
            y += row(pixels(i), kernel[i])
        return y
    # The gradient computes the pixels of a row anew, instead of keeping those of all rows.
    step = jax.checkpoint(lambda y, i: (y + row(pixels(i), kernel[i]), None))
    return lax.scan(step, y, jnp.arange(1, rows))[0]


def _by_group(convolution: Convolution, groups: int) -> Convolution:
    """Gives every channel group its own convolution."""

    def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
        inputs, kernels = jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1)
        return jnp.concatenate(list(map(convolution, inputs, kernels)), axis=-1)

    return split


def _convolution(x: jax.Array, kernel: jax.Array, stride: int, groups: int = 1) -> jax.Array:
    pad = (1, 1)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (pad, pad),
        dimension_numbers=_NHWC,
        feature_group_count=groups,
    )


def _to_tiles(d: list[jax.Array]) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _to_taps(g: list[jax.Array]) -> list[jax.Array]:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _from_tiles(m: list[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
