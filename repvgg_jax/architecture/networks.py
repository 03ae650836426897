"""Networks of other blocks as data: MobileOne, QARepVGG, RepOpt-VGG and RepViT.

They differ from RepVGG in what a layer is: `BLOCKS` has, by the name in `Variant.block`, a function
of a `Layer` of RepVGG to the layers that stand in its place. A layer
may add the input of an earlier one (`Layer.residual`), so a network need not be a plain stack.

Sources: MobileOne (Vasu et al., CVPR 2023), table 2; QARepVGG (Chu et al., AAAI 2024);
RepOptimizers (Ding et al., ICLR 2023), table 1; RepViT (Wang et al., CVPR 2024), table 4; the
authors' code.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

from repvgg_jax.architecture.installed import Block, installed
from repvgg_jax.reparam import (
    ABLATIONS,
    ACB,
    QAREPVGG,
    REPOPT,
    BlockSpec,
    conv_bn,
    mobileone,
    repopt_search,
    repvit,
)
from repvgg_jax.reparam.ablations import residual
from repvgg_jax.reparam.terms import Chain, Conv, Linear, Norm, Scale, Sum

_DEPTHWISE = {branches: mobileone(3, branches) for branches in (1, 4)}
_POINTWISE = {branches: mobileone(1, branches) for branches in (1, 4)}


def _every(layer: Any, *, block: Any) -> tuple[Any, ...]:
    return (dataclasses.replace(layer, block=block),)


def _mobileone(layer: Any, *, branches: int = 1) -> tuple[Any, ...]:
    """A depthwise block, then a pointwise one; the stem is a single block of one branch."""
    if layer.in_channels is None:
        return (dataclasses.replace(layer, block=_DEPTHWISE[1], se=None),)
    # Squeeze-and-excite, if the variant has it: behind the first five of stage 3 (table 2).
    gated = layer.stage == "stage4" or (layer.stage == "stage3" and layer.index >= 5)
    depthwise = dataclasses.replace(
        layer,
        features=layer.in_channels,
        groups=layer.in_channels,
        identity=layer.stride == 1,
        block=_DEPTHWISE[branches],
        se=layer.se if gated else None,
    )
    pointwise = dataclasses.replace(
        layer,
        stride=1,
        groups=1,
        identity=layer.in_channels == layer.features,
        block=_POINTWISE[branches],
        se=depthwise.se,
    )
    return depthwise, pointwise


_MIXER = repvit()
_CONV_BN = {size: conv_bn(size) for size in (1, 3)}
_PROJECTION = conv_bn(1, initial=0.0)


def _repvit(layer: Any) -> tuple[Any, ...]:
    """A block of RepViT, behind what halves height and width if the layer does.

    A block is a depthwise mixer, gated in every other block of a stage, and two 1x1 convolutions
    with a residual connection around both. The stem is two convolutions.
    """
    plain = {"groups": 1, "identity": False, "se": None}

    def conv(size: int, inputs: int | None, features: int, **other: Any) -> Any:
        return dataclasses.replace(
            layer,
            **{"in_channels": inputs, "features": features, "stride": 1, "activate": False}
            | {"block": _CONV_BN[size], **plain, **other},
        )

    if layer.in_channels is None:
        half, stride = layer.features // 2, 1 if layer.stride % 2 else 2
        return (
            conv(3, None, half, stride=layer.stride // stride, activate=True),
            conv(3, half, layer.features, stride=stride),
        )

    def mixer(channels: int, *, gated: bool) -> Any:
        shape = {"groups": channels, "identity": True, "se": layer.se if gated else None}
        return conv(3, channels, channels, block=_MIXER, **shape)

    def feed_forward(channels: int) -> tuple[Any, Any]:
        return (
            conv(1, channels, 2 * channels, activate=True),
            conv(1, 2 * channels, channels, block=_PROJECTION, residual=2),
        )

    before: tuple[Any, ...] = ()
    inputs, features = layer.in_channels, layer.features
    if layer.stride > 1 or inputs != features:
        before = (
            mixer(inputs, gated=False),
            *feed_forward(inputs),
            conv(3, inputs, inputs, stride=layer.stride, groups=inputs),
            conv(1, inputs, features),
            *feed_forward(features),
        )
    return (*before, mixer(features, gated=layer.index % 2 == 0), *feed_forward(features))


def _repopt_search(layer: Any) -> tuple[Any, ...]:
    return (dataclasses.replace(layer, block=repopt_search(layer.index)),)


_RESIDUAL = {
    (projection, branches): residual(projection=projection, branches=branches)
    for projection in (False, True)
    for branches in (False, True)
}


def _residual(layer: Any, *, branches: bool = False) -> tuple[Any, ...]:
    """A residual block of two convolutions; the stem is a single convolution or RepVGG block."""
    if layer.in_channels is None:
        block = ABLATIONS["full" if branches else "no branches"]
    else:
        block = _RESIDUAL[not layer.identity, branches]
    return (dataclasses.replace(layer, block=block),)


BLOCKS: Mapping[str, Block] = types.MappingProxyType(
    {
        "repvgg": lambda layer: (layer,),
        "mobileone": _mobileone,
        "mobileone_4": functools.partial(_mobileone, branches=4),
        "qarepvgg": functools.partial(_every, block=QAREPVGG),
        "repopt": functools.partial(_every, block=REPOPT),
        "repopt_search": _repopt_search,
        "repvit": _repvit,
        # RepVGG's Tables 6 and 7, for `repvgg_jax.studies.ablation`.
        "no_identity": functools.partial(_every, block=ABLATIONS["no identity"]),
        "no_1x1": functools.partial(_every, block=ABLATIONS["no 1x1"]),
        "no_branches": functools.partial(_every, block=ABLATIONS["no branches"]),
        "identity_without_bn": functools.partial(_every, block=ABLATIONS["identity without BN"]),
        "post_addition_bn": functools.partial(_every, block=ABLATIONS["post-addition BN"]),
        "relu_in_branches": functools.partial(_every, block=ABLATIONS["ReLU in branches"]),
        "diracnet": functools.partial(_every, block=ABLATIONS["DiracNet"]),
        "trivial": functools.partial(_every, block=ABLATIONS["trivial"]),
        "acb": functools.partial(_every, block=ACB),
        "residual": _residual,
        "residual_repvgg": functools.partial(_residual, branches=True),
    }
)
"""The names of blocks that the package knows by itself."""


def block_named(name: str) -> Block:
    """The block of that name: one of `BLOCKS`, or that of an installed package.

    Raises:
      ValueError: there is none, or it cannot be used; see `repvgg_jax.architecture.installed`.
    """
    return BLOCKS[name] if name in BLOCKS else installed(name, tuple(BLOCKS))


def _normed(*names: str) -> Linear:
    """The mean of linear layers, each behind a norm of its own."""
    each = tuple(Chain((Norm(f"bn_{n}"), Conv(n, (1, 1), bias=True))) for n in names)
    return each[0] if len(each) == 1 else Chain((Sum(each), Scale(factor=1 / len(each))))


HEADS: Mapping[str, BlockSpec | None] = types.MappingProxyType(
    {
        "linear": None,
        "norm": BlockSpec("head behind a norm", _normed("head")),
        "distilled": BlockSpec("two heads", _normed("head", "head_dist")),
    }
)
"""What `Variant.head` may be: a linear layer, or a block on the pooled features.

RepViT's two classifiers were trained on labels and on those of a teacher; their mean is the result.
"""

_MOBILEONE = {
    "s0": (0.75, 1, 1, 2),
    "s1": (1.5, 1.5, 2, 2.5),
    "s2": (1.5, 2, 2.5, 4),
    "s3": (2, 2.5, 3, 4),
    "s4": (3, 3.5, 3.5, 4),
}
_A, _B, _L = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
_REPVGG = {
    "a0": (_A, (0.75, 0.75, 0.75, 2.5)),
    "a1": (_A, (1, 1, 1, 2.5)),
    "a2": (_A, (1.5, 1.5, 1.5, 2.75)),
    "b0": (_B, (1, 1, 1, 2.5)),
    "b1": (_B, (2, 2, 2, 4)),
    "b2": (_B, (2.5, 2.5, 2.5, 5)),
    "b3": (_B, (3, 3, 3, 5)),
    "l1": (_L, (2, 2, 2, 4)),
    "l2": (_L, (2.5, 2.5, 2.5, 5)),
}
_REPVIT = {
    "m0_6": ((1, 1, 8, 1), 0.625),
    "m0_9": ((2, 2, 14, 2), 0.75),
    "m1_0": ((2, 2, 14, 2), 0.875),
    "m1_1": ((2, 2, 12, 2), 1),
    "m1_5": ((4, 4, 24, 4), 1),
    "m2_3": ((6, 6, 34, 2), 1.25),
}
_GROUPED = [f"b{number}g{groups}" for number in (1, 2, 3) for groups in (2, 4)]


def _repvgg(name: str, **options: Any) -> dict[str, Any]:
    base, _, groups = name.partition("g")
    depths, width = _REPVGG[base]
    return {"depths": depths, "width": width, "groups": int(groups or 1), **options}


def networks() -> dict[str, dict[str, Any]]:
    """Names and fields of the networks: `depths`, `width` multipliers, others of `Variant`."""
    found: dict[str, dict[str, Any]] = {}
    for name, width in _MOBILEONE.items():
        block = "mobileone_4" if name == "s0" else "mobileone"
        found[f"mobileone_{name}"] = {"depths": (2, 8, 10, 1), "width": width, "block": block}
    found["mobileone_s4"]["se"] = {"reduction": 16}
    for name in ("a0", "a1", "a2", "b0", "b1", "b2", "b3", *_GROUPED):
        found[f"qarepvgg_{name}"] = _repvgg(name, block="qarepvgg")
    for name in ("b1", "b2", "l1", "l2"):
        found[f"repopt_{name}"] = _repvgg(name, block="repopt")
        found[f"repopt_{name}_search"] = _repvgg(name, block="repopt_search")
    for name, (depths, factor) in _REPVIT.items():
        found[f"repvit_{name}"] = {
            "depths": depths,
            "width": (factor,) * 4,
            "stem_channels": int(64 * factor),
            "stem_stride": 4,
            "strides": (1, 2, 2, 2),
            "se": {"reduction": 4, "multiple": 8},
            "block": "repvit",
            "activation": "gelu",
            "head": "distilled",
        }
    return found
