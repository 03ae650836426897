"""Blocks that papers compare RepVGG and QARepVGG with, by the names in their tables.

Children have the names of those of `REPVGG` and `QAREPVGG`. Blocks with an identity without a norm
leave no trace of it in their parameters: fuse them with `fuse_model` or `create_model(…).fuse`.
"""

import types
from collections.abc import Mapping

from repvgg_jax.reparam.blocks import KEPT, QAREPVGG, REPVGG, BlockSpec, conv_norm
from repvgg_jax.reparam.terms import (
    Chain,
    Conv,
    Identity,
    Linear,
    Nonlinearity,
    Norm,
    SameShape,
    Scale,
    Sum,
)

_BN3, _BN1 = conv_norm("3x3", 3), conv_norm("1x1", 1)
_K3, _K1 = Conv("conv3x3", (3, 3)), Conv("conv1x1", (1, 1))
_BN0, _INPUT = SameShape(Norm("bn_identity", decay=True)), SameShape(Identity())


def _spec(name: str, *terms: Linear, post_norm: bool = False) -> BlockSpec:
    train: Linear = Sum(terms) if len(terms) > 1 else terms[0]
    return BlockSpec(name, Chain((train, Norm("bn"))) if post_norm else train, keep=KEPT)


ABLATIONS: Mapping[str, BlockSpec] = types.MappingProxyType(
    {
        "full": REPVGG,
        "no identity": _spec("RepVGG without identity", _BN3, _BN1),
        "no 1x1": _spec("RepVGG without 1x1", _BN3, _BN0),
        "no branches": _spec("RepVGG without branches", _BN3),
        "identity without BN": _spec("RepVGG, identity without BN", _BN3, _BN1, _INPUT),
        "post-addition BN": _spec("RepVGG, post-addition BN", _K3, _K1, _INPUT, post_norm=True),
        "ReLU in branches": _spec(
            "RepVGG with ReLU in branches",
            Chain((*_BN3.terms, Nonlinearity())),
            Chain((*_BN1.terms, Nonlinearity())),
            SameShape(Chain((Norm("bn_identity", decay=True), Nonlinearity()))),
        ),
        "DiracNet": _spec(
            "DiracNet",
            Chain((Conv("conv3x3", (3, 3), unit=True), Scale("beta", initial=0.1))),
            SameShape(Scale("alpha")),
            post_norm=True,
        ),
        "trivial": _spec("trivial re-parameterization", _K3, _INPUT, post_norm=True),
    }
)
"""The rows of RepVGG's Tables 6 and 7 (Ding et al., CVPR 2021, section 4.2) that are blocks.

"ReLU in branches" trains but has no deploy form. "DiracNet" is `diag(a) I + diag(b) W / |W|` before
its norm (Zagoruyko and Komodakis, 2017, equation 3), "trivial" is `I + W`.
"""


def residual(*, projection: bool, branches: bool = False) -> BlockSpec:
    """A basic block of ResNet: two 3x3 convolutions with a ReLU between them, and a shortcut.

    It trains but has no deploy form. With `branches`, both convolutions have RepVGG's branches
    (a ResNet made of RepVGG blocks).

    Args:
      projection: whether the shortcut is a 1x1 convolution and its norm, for blocks that change
        the shape, instead of the identity.
      branches: whether both convolutions have branches.
    """

    def conv(suffix: str, *, strided: bool) -> Linear:
        square = conv_norm(f"3x3_{suffix}", 3, strided=strided)
        if not branches:
            return square
        terms: list[Linear] = [square, conv_norm(f"1x1_{suffix}", 1, strided=strided)]
        if not (strided and projection):
            terms.append(Norm(f"bn_identity_{suffix}", decay=True))
        return Sum(tuple(terms))

    through = Chain((conv("a", strided=True), Nonlinearity(), conv("b", strided=False)))
    shortcut = conv_norm("_shortcut", 1) if projection else Identity()
    name = "residual block" + " of RepVGG blocks" * branches
    return BlockSpec(name, Sum((through, shortcut)), keep=KEPT)


QAREPVGG_VERSIONS: Mapping[str, BlockSpec] = types.MappingProxyType(
    {
        "V1": _spec("QARepVGG V1", _BN3, _BN1, _BN0, post_norm=True),
        "V2": QAREPVGG,
        "V3": _spec("QARepVGG V3", _K3, _BN1, _INPUT, post_norm=True),
        "V4": _spec("QARepVGG V4", _K3, _K1, _BN0, post_norm=True),
        "V5": _spec("QARepVGG V5", _BN3, _BN1, _INPUT, post_norm=True),
        "V6": _spec("QARepVGG V6", _BN3, _BN1, _INPUT),
        "M3": _spec("QARepVGG M3", _BN3, _K1, _BN0),
    }
)
"""The versions in the code of QARepVGG's authors (Chu et al., AAAI 2024); V2 is the paper's block.

They differ in which branches have a norm, and V6 and M3 have none behind the sum.
"""
