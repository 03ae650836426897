"""Other projects' names of the children of blocks that are not RepVGG's, keyed by our names."""

_BRANCHES = range(4)
"""Branches of MobileOne: the most that a published network has."""


def _mobileone(branch: str, conv: str, norm: str) -> dict[str, str]:
    """Names of the branches of one size; `branch` has their number."""
    names: dict[str, str] = {}
    for index in _BRANCHES:
        prefix = branch.format(index)
        names |= {f"conv_{index}": f"{prefix}.{conv}", f"bn_{index}": f"{prefix}.{norm}"}
    return names


MOBILEONE_APPLE = {
    **_mobileone("rbr_conv.{}", "conv", "bn"),
    "conv_scale": "rbr_scale.conv",
    "bn_scale": "rbr_scale.bn",
    "bn_skip": "rbr_skip",
    "reparam": "reparam_conv",
    "se/reduce": "se.reduce",
    "se/expand": "se.expand",
}
"""apple/ml-mobileone, mobileone.py."""

MOBILEONE_TIMM = {
    **_mobileone("conv_kxk.{}", "conv", "bn"),
    "conv_scale": "conv_scale.conv",
    "bn_scale": "conv_scale.bn",
    "bn_skip": "identity",
}
"""timm, byobnet.py, beside its names for RepVGG."""

MOBILEONE_MMPRETRAIN = {
    **_mobileone("branch_conv_list.{}", "conv", "norm"),
    "conv_scale": "branch_scale.conv",
    "bn_scale": "branch_scale.norm",
    "bn_skip": "branch_norm",
    "reparam": "branch_reparam",
    "se/reduce": "se.conv1.conv",
    "se/expand": "se.conv2.conv",
}
"""open-mmlab/mmpretrain, mobileone.py."""

QAREPVGG = {
    "conv3x3": "rbr_dense.conv",
    "bn3x3": "rbr_dense.bn",
    "conv1x1": "rbr_1x1",
    "bn": "bn",
    "reparam": "rbr_reparam",
}
"""cxxgtxy/QARepVGG, repvgg.py, block V2."""

REPOPT = {
    "conv": "conv",
    "conv3x3": "conv",
    "conv1x1": "conv_1x1",
    "scale_3x3": "scale_conv",
    "scale_1x1": "scale_1x1",
    "scale_identity": "scale_identity",
    "bn": "bn",
    "reparam": "rbr_reparam",
}
"""DingXiaoH/RepOptimizers, repoptvgg_model.py: the target and the search for scales.

The authors have no deploy form; ours is named as RepVGG's, whose deploy form it is.
"""
