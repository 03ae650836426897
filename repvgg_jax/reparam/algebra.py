"""The arithmetic of re-parameterization: an expression as one kernel and one bias.

In evaluation batch normalization is affine per channel, so a branch, which is a chain of
convolutions and normalizations, is one convolution with a bias, and so is a sum of branches
(RepVGG, section 3.3):

    s  = scale / sqrt(var + epsilon)              batch normalization multiplies by s, so
    K' = K * s          b' = bias - mean * s      this is one branch's kernel and bias;
    K  = K3' + pad(K1') + pad(I')                 kernels add up, zero-padded to the largest,
    b  = b3' + b1' + b0'                          and biases add up

Kernels are (…, height, width, in_channels / groups, out_channels); leading axes stack
independent blocks. NumPy arrays stay NumPy arrays and are computed in float64; JAX arrays,
concrete or traced, stay JAX arrays and are computed in at least float32. No argument is changed.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.linear import Geometry, names, present
from repvgg_jax.reparam.terms import (
    AvgPool,
    Chain,
    Conv,
    Filter,
    Identity,
    Linear,
    Nonlinearity,
    Norm,
    Scale,
    Sum,
)

Array = Any  # a NumPy or a JAX array, concrete or traced
Params = Mapping[str, Mapping[str, Array]]

EPSILON = 1e-5
"""Epsilon of batch normalization in PyTorch, with which the published networks were trained."""


class Affine(NamedTuple):
    """The map `x -> kernel * x + bias`.

    Attributes:
      kernel: (…, height, width, in_channels / groups, out_channels).
      bias: (…, out_channels).
    """

    kernel: Array
    bias: Array


def affine(
    term: Linear, geometry: Geometry, params: Params, stats: Params, *, epsilon: float = EPSILON
) -> Affine:
    """An expression as one convolution kernel and one bias.

    Args:
      term: the expression.
      geometry: of the block; its stride and dilation make no difference.
      params: its parameters by child name.
      stats: running statistics by child name.
      epsilon: of batch normalization.

    Returns:
      Kernel and bias, float64 from NumPy arrays, in at least float32 from JAX arrays.

    Raises:
      ValueError: nothing is left of the expression, or its terms do not fit together.
    """
    resolved = present(term, geometry.has_same_shape)
    if resolved is None:
        raise ValueError("nothing is left of the expression without the terms in SameShape")
    in_per_group = geometry.in_channels // geometry.groups
    axes = (
        leaf.ndim - (4 if name == "kernel" else 1)
        for child in names(resolved) & params.keys()
        for name, leaf in params[child].items()
    )
    start = _Partial(None, None, in_per_group, geometry.in_channels, max(axes, default=0))

    def fold(params: Params, stats: Params) -> Affine:
        return _follow(resolved, start, params, stats, epsilon).materialize(params)

    own = {child: params[child] for child in names(resolved) & params.keys()}
    moments = {child: stats[child] for child in names(resolved) & stats.keys()}
    sharding = _explicit_sharding(own, (in_per_group, geometry.features))
    if sharding is None:
        return fold(own, moments)
    # Composed kernels have no sharding that follows from those of the operands.
    return jax.sharding.auto_axes(fold, out_sharding=sharding)(own, moments)


def _explicit_sharding(params: Params, channels: tuple[int, int]) -> Affine | None:
    """How to shard a kernel and a bias of these channels; None outside of explicit meshes."""
    mesh, chosen = None, None
    for leaf in jax.tree.leaves(params):
        if not isinstance(leaf, jax.Array):
            continue
        sharding = jax.typeof(leaf).sharding
        if sharding.mesh.explicit_axes:
            mesh = mesh or sharding.mesh
            size = leaf.shape[-4:-2]
            if leaf.ndim >= 4 and leaf.shape[-2:] == channels and (not chosen or size > chosen[0]):
                chosen = size, (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    if mesh is None:
        return None
    spec = chosen[1] if chosen else (None,) * 4
    lead = spec[:-4]
    kernel = jax.sharding.PartitionSpec(*lead, None, None, *spec[-2:])
    bias = jax.sharding.PartitionSpec(*lead, spec[-1])
    return Affine(*(jax.sharding.NamedSharding(mesh, axes) for axes in (kernel, bias)))


def parallel(maps: Sequence[Affine]) -> Affine:
    """The sum of maps; smaller kernels are zero-padded around their center to the largest.

    Raises:
      ValueError: the maps have different channels or groups.
    """
    return _summed(maps, copy=True)


def _summed(maps: Sequence[Affine], *, copy: bool) -> Affine:
    """`parallel`; without `copy` a NumPy kernel among `maps` becomes the result."""
    if len({m.kernel.shape[-2:] for m in maps}) > 1:
        shapes = ", ".join(str(m.kernel.shape) for m in maps)
        raise ValueError(f"maps of different channels or groups cannot be added: kernels {shapes}")
    height, width = (max(m.kernel.shape[axis] for m in maps) for axis in (-4, -3))
    largest = max(maps, key=lambda m: (m.kernel.shape[-4:-2] == (height, width), m.kernel.ndim))
    kernel = largest.kernel.astype(_wide_dtype(largest.kernel), copy=copy)
    lead = np.broadcast_shapes(*(m.kernel.shape[:-4] for m in maps))
    if kernel.shape[:-4] != lead:  # e.g. of a pooling, which has no parameters to be stacked
        kernel = namespace(kernel).broadcast_to(kernel, (*lead, *kernel.shape[-4:])).copy()
    if kernel.shape[-4:-2] != (height, width):  # e.g. of a 1x3 and a 3x1 kernel
        shape = (*kernel.shape[:-4], height, width, *kernel.shape[-2:])
        kernel = _add_at_center(namespace(kernel).zeros(shape, kernel.dtype), kernel)
    bias = largest.bias
    for other in maps:
        if other is not largest:
            kernel = _add_at_center(kernel, other.kernel)
            bias = bias + other.bias
    return Affine(kernel, bias)


def compose(first: Affine, then: Affine) -> Affine:
    """`then` applied to the output of `first`, e.g. a 3x3 convolution behind a 1x1 one.

    Exact everywhere if `then` pads with the bias of `first`, and where `first` has stride 1 or
    `then` a 1x1 kernel. The groups of `first` must be those of `then`, or divide them.

    Raises:
      ValueError: the channels of the two maps do not fit.
    """
    middle, per_group = first.kernel.shape[-1], then.kernel.shape[-2]
    if middle % per_group or then.kernel.shape[-1] % (middle // per_group):
        raise ValueError(
            f"a kernel of shape {then.kernel.shape} cannot follow one of {first.kernel.shape}: "
            f"{middle} channels do not split into groups of {per_group}"
        )
    groups = middle // per_group
    xp = namespace(first.kernel, then.kernel)
    a, b = widened(first.kernel), widened(then.kernel)
    a = a.reshape(*a.shape[:-1], groups, per_group)
    b = b.reshape(*b.shape[:-1], groups, -1)

    def product(tap: Array) -> Array:
        out = xp.einsum("...hwigm,...mgo->...hwigo", a, tap, **_precise(xp))
        return out.reshape(*out.shape[:-2], -1)

    (ah, aw), (bh, bw) = first.kernel.shape[-4:-2], then.kernel.shape[-4:-2]
    taps = [
        (row, column, product(b[..., row, column, :, :, :]))
        for row, column in itertools.product(range(bh), range(bw))
    ]
    if (bh, bw) == (1, 1):
        kernel = taps[0][2]
    else:
        _, _, one = taps[0]
        kernel = xp.zeros((*one.shape[:-4], ah + bh - 1, aw + bw - 1, *one.shape[-2:]), one.dtype)
        for row, column, part in taps:
            kernel = _add_at(kernel, part, row, column)
    carried = widened(first.bias).reshape(*first.bias.shape[:-1], groups, per_group)
    summed = b.sum(axis=(-5, -4))  # over taps: the response to a constant
    bias = xp.einsum("...gm,...mgo->...go", carried, summed, **_precise(xp))
    return Affine(kernel, bias.reshape(*bias.shape[:-2], -1) + widened(then.bias))


def identity_kernel(channels: int, in_per_group: int, dtype: Any) -> np.ndarray:
    """The 1x1 kernel of `x -> x`: output i is input `i mod in_per_group` of its group."""
    kernel = np.zeros((1, 1, in_per_group, channels), dtype)
    out = np.arange(channels)
    kernel[0, 0, out % in_per_group, out] = 1
    return kernel


class _Partial(NamedTuple):
    """What a chain computes up to a term.

    `kernel` is None before the first convolution, `bias` is None while it is zero.
    """

    kernel: Array | None
    bias: Array | None
    in_per_group: int
    in_channels: int
    lead: int  # how many leading axes there are
    is_input: bool = False  # whether the kernel is an array of the caller

    def materialize(self, params: Params) -> Affine:
        """Kernel and bias, with the identity's kernel and a bias of zero in place of None."""
        kernel, bias = self.kernel, self.bias
        if kernel is None:
            leaves = jax.tree.leaves(params)
            dtype = np.result_type(*[leaf.dtype for leaf in leaves]) if leaves else np.float64
            kernel = identity_kernel(self.in_channels, self.in_per_group, dtype)
            kernel = kernel.reshape((1,) * self.lead + kernel.shape)
        if bias is None:
            shape = (*kernel.shape[:-4], kernel.shape[-1])
            bias = namespace(kernel).zeros(shape, _wide_dtype(kernel))
        return Affine(kernel, bias)

    def scaled(self, factor: Array, shift: Array | None, params: Params) -> Self:
        """Appends a multiplication and an addition per channel, (…, channels)."""
        kernel = self.materialize(params).kernel
        bias = shift if self.bias is None else self.bias * factor + (0 if shift is None else shift)
        kernel = kernel * factor[..., None, None, None, :]
        return self._replace(kernel=kernel, bias=bias, is_input=False)


def _follow(term: Linear, x: _Partial, params: Params, stats: Params, epsilon: float) -> _Partial:
    """What a chain computes behind one more term."""
    if isinstance(term, Chain):
        for child in term.terms:
            x = _follow(child, x, params, stats, epsilon)
        return x
    if isinstance(term, Sum):
        ends = [_follow(child, x, params, stats, epsilon) for child in term.terms]
        copy = any(end.kernel is None or end.is_input for end in ends)
        kernel, bias = _summed([end.materialize(params) for end in ends], copy=copy)
        return x._replace(kernel=kernel, bias=bias)
    if isinstance(term, Norm):
        scale, bias = (widened(params[term.name][leaf]) for leaf in ("scale", "bias"))
        mean, var = (widened(stats[term.name][leaf]) for leaf in ("mean", "var"))
        factor = scale / namespace(var).sqrt(var + epsilon)
        return x.scaled(factor, bias - mean * factor, params)
    if isinstance(term, Scale):
        if term.name is None:
            kernel, bias = x.materialize(params)
            return x._replace(kernel=widened(kernel) * term.factor, bias=bias * term.factor)
        leaves = params[term.name]
        shift = widened(leaves["bias"]) * term.factor if term.bias else None
        return x.scaled(widened(leaves["scale"]) * term.factor, shift, params)
    if isinstance(term, Conv):
        kernel = params[term.name]["kernel"]
        kernel = dilated(unit_norm(kernel) if term.unit else kernel, term.dilation)
        channels = x.in_channels if x.kernel is None else x.kernel.shape[-1]
        kernel = _regrouped(kernel, channels, x.in_channels // x.in_per_group)
        bias = widened(params[term.name]["bias"]) if term.bias else None
        own = x._replace(kernel=kernel, bias=bias, is_input=True)
        if x.kernel is None and x.bias is None:
            return own
        kernel, bias = compose(x.materialize(params), own.materialize(params))
        return x._replace(kernel=kernel, bias=bias)
    if isinstance(term, (AvgPool, Filter)):
        first = x.materialize(params)
        channels = first.kernel.shape[-1]
        size = term.kernel_size
        taps = (
            term.kernel(channels)
            if isinstance(term, Filter)
            else np.full((*size, 1, channels), 1 / (size[0] * size[1]))
        )
        pool = taps.astype(_wide_dtype(first.kernel)).reshape(*(1,) * x.lead, *taps.shape)
        bias = np.zeros((*(1,) * x.lead, channels), pool.dtype)
        return x._replace(**compose(first, Affine(pool, bias))._asdict())
    if isinstance(term, Identity):
        return x
    if isinstance(term, Nonlinearity):
        raise ValueError(f"{term.function} inside the expression is not linear")
    raise TypeError(f"not a term of a linear expression: {term!r}")


def unit_norm(kernel: Array) -> Array:
    """The kernel divided by its L2 norm per output channel, in at least float32."""
    kernel = widened(kernel)
    squares = (kernel * kernel).sum(axis=(-4, -3, -2), keepdims=True)
    return kernel / namespace(kernel).sqrt(squares)


def dilated(kernel: Array, dilation: int) -> Array:
    """The kernel with `dilation - 1` zeros between its taps."""
    if dilation == 1:
        return kernel
    height, width = ((size - 1) * dilation + 1 for size in kernel.shape[-4:-2])
    rows, columns = slice(None, None, dilation), slice(None, None, dilation)
    shape = (*kernel.shape[:-4], height, width, *kernel.shape[-2:])
    if isinstance(kernel, np.ndarray):
        out = np.zeros(shape, kernel.dtype)
        out[..., rows, columns, :, :] = kernel
        return out
    return jnp.zeros(shape, kernel.dtype).at[..., rows, columns, :, :].set(kernel)


def _regrouped(kernel: Array, in_channels: int, groups: int) -> Array:
    """The same convolution in fewer groups, its kernel padded with zeros between channels.

    Args:
      kernel: (…, height, width, in_channels / own groups, out_channels).
      in_channels: channels of its input.
      groups: that it gets.

    Raises:
      ValueError: `groups` do not divide its own.
    """
    per_group, out_channels = kernel.shape[-2:]
    own = in_channels // per_group
    if own == groups:
        return kernel
    if own % groups or out_channels % own:
        raise ValueError(f"a convolution in {own} groups cannot be one in {groups} groups")
    inside = own // groups
    position = np.arange(out_channels) * own // out_channels % inside
    mask = np.arange(inside)[:, None] == position  # (inside, out_channels)
    mask = mask.reshape(*(1,) * (kernel.ndim - 2), inside, 1, out_channels)
    spread = kernel[..., None, :, :] * mask.astype(kernel.dtype)
    return spread.reshape(*kernel.shape[:-2], inside * per_group, out_channels)


def _add_at_center(kernel: Array, smaller: Array) -> Array:
    """`kernel` plus `smaller` at its center; a NumPy `kernel` must be the caller's own."""
    row, column = (
        (big - small) // 2
        for big, small in zip(kernel.shape[-4:-2], smaller.shape[-4:-2], strict=True)
    )
    return _add_at(kernel, smaller, row, column)


def _add_at(kernel: Array, smaller: Array, row: int, column: int) -> Array:
    height, width = smaller.shape[-4:-2]
    where = (..., slice(row, row + height), slice(column, column + width), slice(None), slice(None))
    if isinstance(kernel, np.ndarray):
        if isinstance(smaller, np.ndarray):
            kernel[where] += smaller
            return kernel
        kernel = jnp.asarray(kernel)
    return kernel.at[where].add(smaller)


def _wide_dtype(array: Array) -> Any:
    if isinstance(array, (np.ndarray, np.generic)):
        return np.float64
    return jnp.promote_types(array.dtype, jnp.float32)


def widened(array: Array) -> Array:
    """The array in float64 if it is NumPy's, else in at least float32."""
    dtype = _wide_dtype(array)
    return array if array.dtype == dtype else array.astype(dtype)


def namespace(*arrays: Array) -> Any:
    """`numpy` where all arrays are NumPy's, else `jax.numpy`."""
    return np if all(isinstance(a, (np.ndarray, np.generic)) for a in arrays) else jnp


def _precise(xp: Any) -> dict[str, Any]:
    # The default matmul precision on accelerators is below float32.
    return {} if xp is np else {"precision": "highest"}
