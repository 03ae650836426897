"""Structural re-parameterization: describe a block once, train it, fuse it, unfuse it.

`terms` are the terms of the expression that describes a block, `linear` derives names, shapes and
MACs from it, and `algebra` turns it into one kernel and bias. `blocks` has `BlockSpec` and the
built-in blocks, `family` those of other papers, and `ablations` RepVGG's and QARepVGG's ablations.
`tree` recognizes blocks in trees of parameters, made of the `containers` of any library; `fuse` and
`unfuse` convert them, `decay` is their weight decay, and `equalize` scales the channels between
fused ones. `rep_optimizer` and `online` train one convolution in place of branches. `probe` reads
the kernel of any linear layer off its impulse response. None of them depends on Flax: they work on
NumPy or JAX arrays, traced, sharded or stacked along leading axes.
"""

from repvgg_jax.reparam.ablations import ABLATIONS, QAREPVGG_VERSIONS
from repvgg_jax.reparam.algebra import EPSILON, Affine, affine, compose, parallel
from repvgg_jax.reparam.blocks import (
    ACB,
    BUILT_IN,
    CONV_BN,
    DBB,
    QAREPVGG,
    REPVGG,
    BlockSpec,
    acb,
    conv_bn,
    dbb,
    large_kernel,
    mobileone,
)
from repvgg_jax.reparam.decay import decay_mask, equivalent_l2
from repvgg_jax.reparam.equalize import equalize
from repvgg_jax.reparam.family import (
    OREPA,
    REPCONV,
    REPCONVN,
    REPOPT,
    dilated_reparam,
    ecb,
    fastvit,
    fastvit_position,
    repopt_search,
    repvit,
)
from repvgg_jax.reparam.fuse import fuse_block, fuse_params
from repvgg_jax.reparam.linear import Geometry, Leaf, kernel_size, leaves, macs
from repvgg_jax.reparam.probe import fuse_linear
from repvgg_jax.reparam.rep_optimizer import extract_scales, rep_init, rep_optimizer
from repvgg_jax.reparam.terms import (
    AvgPool,
    Chain,
    Conv,
    Filter,
    Identity,
    Linear,
    Nonlinearity,
    Norm,
    SameShape,
    Scale,
    Sum,
)
from repvgg_jax.reparam.tree import input_channels
from repvgg_jax.reparam.unfuse import unfuse_params

__all__ = [
    "ABLATIONS",
    "ACB",
    "BUILT_IN",
    "CONV_BN",
    "DBB",
    "EPSILON",
    "OREPA",
    "QAREPVGG",
    "QAREPVGG_VERSIONS",
    "REPCONV",
    "REPCONVN",
    "REPOPT",
    "REPVGG",
    "Affine",
    "AvgPool",
    "BlockSpec",
    "Chain",
    "Conv",
    "Filter",
    "Geometry",
    "Identity",
    "Leaf",
    "Linear",
    "Nonlinearity",
    "Norm",
    "SameShape",
    "Scale",
    "Sum",
    "acb",
    "affine",
    "compose",
    "conv_bn",
    "dbb",
    "decay_mask",
    "dilated_reparam",
    "ecb",
    "equalize",
    "equivalent_l2",
    "extract_scales",
    "fastvit",
    "fastvit_position",
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
    "rep_init",
    "rep_optimizer",
    "repopt_search",
    "repvit",
    "unfuse_params",
]
