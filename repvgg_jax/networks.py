"""Networks of other blocks as data: MobileOne, QARepVGG and RepOpt-VGG.

They differ from RepVGG in what a layer is: `BLOCKS` has, by the name in `Variant.block`, a function
of a `Layer` (`repvgg_jax.variants`) of RepVGG to the layers that stand in its place.

Sources: MobileOne (Vasu et al., CVPR 2023), table 2; QARepVGG (Chu et al., AAAI 2024);
RepOptimizers (Ding et al., ICLR 2023), table 1; the authors' code.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from repvgg_jax.reparam import ABLATIONS, ACB, QAREPVGG, REPOPT, mobileone, repopt_search
from repvgg_jax.reparam.ablations import residual

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


BLOCKS: Mapping[str, Callable[..., tuple[Any, ...]]] = types.MappingProxyType(
    {
        "repvgg": lambda layer: (layer,),
        "mobileone": _mobileone,
        "mobileone_4": functools.partial(_mobileone, branches=4),
        "qarepvgg": functools.partial(_every, block=QAREPVGG),
        "repopt": functools.partial(_every, block=REPOPT),
        "repopt_search": _repopt_search,
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
"""What `Variant.block` may be."""

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
    return found
