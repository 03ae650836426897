"""The arithmetic of re-parameterization.

In evaluation a RepVGG block is a sum of branches, and each branch is a chain of linear
pieces: a convolution or nothing (the identity), then batch normalisation. Chains and sums
of linear maps are linear, so the block is one convolution (paper, section 3.3):

    s  = scale / sqrt(var + epsilon)              batch normalisation multiplies by s, so
    K' = K * s          b' = bias - mean * s      these are one branch's kernel and bias;
    K  = K3' + pad(K1') + pad(I')                 kernels add up, smaller ones at the centre,
    b  = b3' + b1' + b0'                          and biases add up

Kernels are (…, height, width, in_channels / groups, out_channels); leading axes stack
independent blocks. NumPy arrays stay NumPy arrays, JAX arrays stay JAX arrays.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # a NumPy or a JAX array, concrete or traced

EPSILON = 1e-5  # PyTorch's, under which every published RepVGG was trained


class Affine(NamedTuple):
    """The map `x -> kernel * x + bias`.

    Attributes:
      kernel: (…, height, width, in_channels / groups, out_channels).
      bias: (…, out_channels).
    """

    kernel: Array
    bias: Array


def normalise(kernel: Array, norm: Mapping[str, Array], epsilon: float) -> Affine:
    """A convolution without bias, followed by batch normalisation with running statistics.

    `norm` holds scale, bias, mean and var, each (…, out_channels).
    """
    factor = norm["scale"] / namespace(norm["var"]).sqrt(norm["var"] + epsilon)
    return Affine(kernel * factor[..., None, None, None, :], norm["bias"] - norm["mean"] * factor)


def identity_kernel(channels: int, in_per_group: int, dtype: Any) -> np.ndarray:
    """The 1x1 kernel of `x -> x`: output i is input `i mod in_per_group` of its group."""
    kernel = np.zeros((1, 1, in_per_group, channels), dtype)
    out = np.arange(channels)
    kernel[0, 0, out % in_per_group, out] = 1
    return kernel


def add(maps: Sequence[Affine]) -> Affine:
    """The sum of maps, of which the first has the largest kernel."""
    (kernel, bias), *rest = maps
    for smaller in rest:
        kernel = add_at_centre(kernel, smaller.kernel)
        bias = bias + smaller.bias
    return Affine(kernel, bias)


def add_at_centre(kernel: Array, smaller: Array) -> Array:
    """`kernel` plus `smaller` zero-padded to its size.

    A NumPy `kernel` is added to in place: hand over one of your own.
    """
    sizes = zip(kernel.shape[-4:-2], smaller.shape[-4:-2], strict=True)
    rows, columns = (slice((big - small) // 2, (big + small) // 2) for big, small in sizes)
    centre = (..., rows, columns, slice(None), slice(None))
    if isinstance(kernel, np.ndarray):
        kernel[centre] += smaller
        return kernel
    return kernel.at[centre].add(smaller)


def upcast(tree: Any) -> Any:
    """float64 copies where all leaves are NumPy arrays, else at least float32 JAX arrays."""
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(lambda a: a.astype(np.float64), tree)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(a.dtype, jnp.float32)), tree)


def namespace(array: Array) -> Any:
    """`numpy` or `jax.numpy`, whichever the array belongs to."""
    return np if isinstance(array, (np.ndarray, np.generic)) else jnp
