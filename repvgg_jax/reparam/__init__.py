"""Structural re-parameterization: describe a block once, train it, fuse it, unfuse it.

`linear` is the expression that describes a block, `algebra` turns it into one kernel and bias,
and `blocks` are the blocks of the literature as values. `tree` recognizes blocks in trees of
parameters, `fuse` and `unfuse` convert them, and `decay` is their weight decay. `probe` reads the
kernel of any linear layer off its impulse response. None of them depends on Flax: they work on
NumPy or JAX arrays, traced, sharded or stacked along leading axes.
"""

from repvgg_jax.reparam.algebra import EPSILON, Affine, affine, compose, parallel
from repvgg_jax.reparam.blocks import (
    ACB,
    BUILT_IN,
    CONV_BN,
    DBB,
    QAREPVGG,
    REPVGG,
    BlockSpec,
    conv_bn,
    large_kernel,
    mobileone,
)
from repvgg_jax.reparam.decay import decay_mask, equivalent_l2
from repvgg_jax.reparam.fuse import fuse_block, fuse_params
from repvgg_jax.reparam.linear import (
    AvgPool,
    Chain,
    Conv,
    Geometry,
    Identity,
    Leaf,
    Linear,
    Norm,
    SameShape,
    Scale,
    Sum,
    kernel_size,
    leaves,
    macs,
)
from repvgg_jax.reparam.probe import fuse_linear
from repvgg_jax.reparam.tree import input_channels
from repvgg_jax.reparam.unfuse import unfuse_params

__all__ = [
    "ACB",
    "BUILT_IN",
    "CONV_BN",
    "DBB",
    "EPSILON",
    "QAREPVGG",
    "REPVGG",
    "Affine",
    "AvgPool",
    "BlockSpec",
    "Chain",
    "Conv",
    "Geometry",
    "Identity",
    "Leaf",
    "Linear",
    "Norm",
    "SameShape",
    "Scale",
    "Sum",
    "affine",
    "compose",
    "conv_bn",
    "decay_mask",
    "equivalent_l2",
    "fuse_block",
    "fuse_linear",
    "fuse_params",
    "input_channels",
    "kernel_size",
    "large_kernel",
    "leaves",
    "macs",
    "mobileone",
    "parallel",
    "unfuse_params",
]
