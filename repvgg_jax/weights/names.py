"""Keys and layouts of other RepVGG projects' checkpoints.

    family       block prefix            3x3 branch           classifier
    official     stage1.0.               rbr_dense.conv/bn    linear.
    timm         stages.0.0.             conv_kxk.conv/bn     head.fc.
    mmpretrain   backbone.stage_1.0.     branch_3x3.conv/norm head.fc.
    flax         params/stage1_block0/   conv3x3, bn3x3       params/head/

In a larger network, e.g. a detector, the block's prefix follows another one.
For networks of other blocks, `official` are the names of their authors.

The authors' RepVGGplus is a second naming of the family `official`: blocks are in a child
`blocks` of their stage, stage 3 is two containers, and squeeze-and-excite is `post_se`.

The tables are keyed by our names of a block's children.
"""

import dataclasses

from repvgg_jax.variants import Variant
from repvgg_jax.weights import names_family, repvit
from repvgg_jax.weights.naming import FlaxNaming, Naming, TorchNaming

_OFFICIAL_CHILDREN = {
    "conv3x3": "rbr_dense.conv",
    "bn3x3": "rbr_dense.bn",
    "conv1x1": "rbr_1x1.conv",
    "bn1x1": "rbr_1x1.bn",
    "bn_identity": "rbr_identity",
    "reparam": "rbr_reparam",
}

OFFICIAL = TorchNaming(
    family="official",
    stem="stage0",
    stage="stage{stage}",
    children={**_OFFICIAL_CHILDREN, "se/reduce": "se.down", "se/expand": "se.up"},
    head="linear",
)
PLUS = TorchNaming(
    family="official",
    stem="stage0",
    stage="stage{stage}{part}",
    children={**_OFFICIAL_CHILDREN, "se/reduce": "post_se.down", "se/expand": "post_se.up"},
    head="linear",
    plus=True,
)
TIMM = TorchNaming(
    family="timm",
    stem="stem",
    stage="stages.{stage0}",
    children={
        "conv3x3": "conv_kxk.conv",
        "bn3x3": "conv_kxk.bn",
        "conv1x1": "conv_1x1.conv",
        "bn1x1": "conv_1x1.bn",
        "bn_identity": "identity",
        "reparam": "reparam_conv",
        **names_family.MOBILEONE_TIMM,
        "se/reduce": "attn.fc1",
        "se/expand": "attn.fc2",
    },
    head="head.fc",
)
MMPRETRAIN = TorchNaming(
    family="mmpretrain",
    stem="backbone.stem",
    stage="backbone.stage_{stage}",
    children={
        "conv3x3": "branch_3x3.conv",
        "bn3x3": "branch_3x3.norm",
        "conv1x1": "branch_1x1.conv",
        "bn1x1": "branch_1x1.norm",
        "bn_identity": "branch_norm",
        "reparam": "branch_reparam",
        "se/reduce": "se_layer.conv1.conv",
        "se/expand": "se_layer.conv2.conv",
    },
    head="head.fc",
)
# Backbones alone: what timm.create_model(…, features_only=True) has, and a detector's `backbone`.
TIMM_FEATURES = dataclasses.replace(TIMM, stage="stages_{stage0}")
MMPRETRAIN_BACKBONE = dataclasses.replace(MMPRETRAIN, stem="stem", stage="stage_{stage}")
# The authors of other blocks; their stem is a block, too.
_AUTHORS = TorchNaming("official", "stage0", "stage{stage}", {}, "linear")
MOBILEONE = dataclasses.replace(_AUTHORS, children=names_family.MOBILEONE_APPLE)
QAREPVGG = dataclasses.replace(_AUTHORS, children=names_family.QAREPVGG)
REPOPT = dataclasses.replace(_AUTHORS, children=names_family.REPOPT)
MOBILEONE_MMPRETRAIN = TorchNaming(
    family="mmpretrain",
    stem="backbone.stage0",
    stage="backbone.stage{stage}",
    children=names_family.MOBILEONE_MMPRETRAIN,
    head="head.fc",
)
REPVIT = repvit.Authors()
REPVIT_TIMM = repvit.Timm()
FLAX = FlaxNaming()

NAMINGS: tuple[Naming, ...] = (
    *(OFFICIAL, PLUS, TIMM, MMPRETRAIN),
    *(MOBILEONE, QAREPVGG, REPOPT, MOBILEONE_MMPRETRAIN, REPVIT, REPVIT_TIMM),
    *(TIMM_FEATURES, MMPRETRAIN_BACKBONE, FLAX),
)
"""All namings that are read; the first of each family that has the names is written."""

FAMILIES = tuple(dict.fromkeys(naming.family for naming in NAMINGS))
"""The families by name."""


def naming_for(family: str, variant: Variant) -> Naming:
    """The naming of a family that covers a variant.

    Raises:
      ValueError: unknown family, or it has no names for such a network.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    for naming in NAMINGS:
        if naming.family == family and naming.covers(variant):
            return naming
    others = dict.fromkeys(naming.family for naming in NAMINGS if naming.covers(variant))
    raise ValueError(
        f"{family} has no names for the blocks, the squeeze-and-excite after the ReLU or the "
        f"auxiliary heads of {variant.name}; use family={' or '.join(map(repr, others))}"
    )
