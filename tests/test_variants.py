import dataclasses
import json

import pytest

from repvgg_jax import VARIANTS, SqueezeExcite, Variant, cost, get_variant

pytestmark = pytest.mark.core


def test_the_fifteen_official_names():
    assert " ".join(VARIANTS) == (
        "A0 A1 A2 B0 B1 B1g2 B1g4 B2 B2g2 B2g4 B3 B3g2 B3g4 D2se plus-L2pse"
    )


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("B1g4", "B1g4"),
        ("RepVGG-B1g4", "B1g4"),
        ("repvgg_b1g4", "B1g4"),
        ("RepVGG-D2se", "D2se"),
        ("RepVGGplus-L2pse", "plus-L2pse"),
        ("plus-L2pse", "plus-L2pse"),
    ],
)
def test_spellings(spelling, name):
    assert get_variant(spelling) is VARIANTS[name]


def test_a_variant_is_itself():
    own = Variant("mine", (1,), (8,), 4)
    assert get_variant(own) is own


@pytest.mark.parametrize(("typo", "meant"), [("B1g3", "B1g2"), ("A9", "A0"), ("D2s", "D2se")])
def test_unknown_names_ask_did_you_mean(typo, meant):
    with pytest.raises(ValueError, match=f"unknown variant '{typo}'; did you mean .*{meant}"):
        get_variant(typo)


def test_far_off_names_list_the_official_ones():
    with pytest.raises(ValueError, match=r"unknown variant 'resnet50'.*A0, A1.*plus-L2pse"):
        get_variant("resnet50")


@pytest.mark.parametrize(
    ("name", "blocks", "identities", "channels"),
    [
        ("A0", 22, 17, (48, 48, 96, 192, 1280)),
        ("A2", 22, 17, (64, 96, 192, 384, 1408)),
        ("B0", 28, 23, (64, 64, 128, 256, 1280)),
        ("B1", 28, 23, (64, 128, 256, 512, 2048)),
        ("B2", 28, 23, (64, 160, 320, 640, 2560)),
        ("B3g4", 28, 23, (64, 192, 384, 768, 2560)),
        ("D2se", 48, 43, (64, 160, 320, 640, 2560)),
        ("plus-L2pse", 48, 43, (64, 160, 320, 640, 2560)),
    ],
)
def test_blocks_and_widths(name, blocks, identities, channels):
    layers = VARIANTS[name].layers()
    assert len(layers) == blocks
    assert sum(layer.identity for layer in layers) == identities
    widths = {layer.stage: layer.features for layer in layers}
    assert tuple(widths.values()) == channels


@pytest.mark.parametrize("name", ["B1g2", "B1g4", "B2g2", "B2g4", "B3g2", "B3g4"])
def test_group_map_is_the_papers(name):
    groups = int(name[-1])
    layers = VARIANTS[name].layers()
    grouped = {index for index, layer in enumerate(layers) if layer.groups == groups}
    assert grouped == set(range(2, 27, 2))
    assert all(layers[index].identity for index in grouped)


def test_output_stride_dilates_whole_stages_and_keeps_names_and_identities():
    variant = VARIANTS["A0"]
    plain, dilated = variant.layers(), variant.layers(output_stride=8)
    stages = {layer.stage: (layer.stride, layer.dilation) for layer in dilated}
    assert stages["stage2"] == (1, 1)
    assert stages["stage3"] == (1, 2)
    assert stages["stage4"] == (1, 4)
    for a, b in zip(plain, dilated, strict=True):
        assert (a.name, a.features, a.groups, a.identity) == (
            b.name,
            b.features,
            b.groups,
            b.identity,
        )


@pytest.mark.parametrize(
    ("stride", "stages"),
    [
        (32, {"stage3": (1, 1, 1), "stage4": (1,)}),
        (16, {"stage3": (1, 1, 1), "stage4": (1,)}),
        (8, {"stage3": (1, 2, 2), "stage4": (2,)}),
        (4, {"stage2": (1, 2, 2), "stage3": (2, 4, 4), "stage4": (2,)}),
    ],
)
def test_timms_dilation(stride, stages):
    """As timm 1.0.31 builds its stages (create_byob_stages)."""
    layers = dataclasses.replace(VARIANTS["B0"], dilation="timm").layers(stride)
    for stage, dilations in stages.items():
        found = tuple(layer.dilation for layer in layers if layer.stage == stage)
        assert found[: len(dilations)] == dilations
        assert set(found[1:]) <= {dilations[-1]}
    plain = VARIANTS["B0"].layers(stride)
    changed = [dataclasses.replace(layer, dilation=1) for layer in layers]
    assert changed == [dataclasses.replace(layer, dilation=1) for layer in plain]


def test_every_block_may_have_its_own_width():
    pruned = Variant("pruned", (3, 2), ((8, 8, 6), (12, 10)), 8)
    layers = pruned.layers()
    assert [(layer.in_channels, layer.features) for layer in layers] == [
        *((None, 8), (8, 8), (8, 8), (8, 6)),
        *((6, 12), (12, 10)),
    ]
    assert [layer.identity for layer in layers] == [False, False, True, False, False, False]
    assert pruned.features == 10
    same = Variant("same", (3, 2), ((8, 8, 8), 12), 8)
    assert same.layers() == Variant("same", (3, 2), (8, 12), 8).layers()
    read = Variant(**json.loads(json.dumps(dataclasses.asdict(pruned))))
    assert read == pruned
    assert hash(read) == hash(pruned)
    assert cost(pruned, image_size=32).params_deploy == sum(
        9 * (layer.in_channels or 3) * layer.features + layer.features for layer in layers
    ) + 1000 * (10 + 1)


@pytest.mark.parametrize("stride", [1, 3, 24, 64])
def test_impossible_output_strides_name_the_possible_ones(stride):
    with pytest.raises(ValueError, match=rf"output_stride={stride}.*2, 4, 8, 16, 32"):
        VARIANTS["A0"].layers(output_stride=stride)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2)}, "2 depths .* but 1 channels"),
        ({"depths": ()}, "0 depths"),
        ({"depths": (0,)}, "positive integer"),
        ({"channels": (8.5,)}, "positive integer"),
        ({"channels": ((8, 8),)}, "2 channels .* for 1 blocks of stage 1"),
        ({"channels": ((0,),)}, "positive integer"),
        ({"dilation": "half"}, "'half' must be one of 'stage', 'timm'"),
        ({"strides": (1, 2)}, "2 strides .* for 1 stages"),
        ({"groups": (1, 2)}, "2 groups for 1 blocks"),
        ({"groups": (3,)}, "stage1_block0 has 4 channels in, which 3 groups do not divide"),
        ({"auxiliary": ("stage9_block0",)}, "auxiliary names no block: stage9_block0"),
    ],
)
def test_impossible_variants(options, message):
    fields = {"depths": (1,), "channels": (8,), "stem_channels": 4, **options}
    with pytest.raises(ValueError, match=message):
        Variant("mine", **fields)


def test_lists_from_a_file_make_the_same_variant():
    a = Variant(
        "mine", [1, 2], [8, 8], 4, se={"reduction": 4, "after_relu": True}, groups=[1, 2, 1]
    )
    b = Variant("mine", (1, 2), (8, 8), 4, se=SqueezeExcite(4, True), groups=(1, 2, 1))
    assert a == b
    assert hash(a) == hash(b)
