"""Networks of other blocks: their sizes, their forms, and checkpoints of other projects."""

import dataclasses
import hashlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import repvgg_jax as rv
from repvgg_jax import reparam
from repvgg_jax.weights.detect import detect
from repvgg_jax.weights.names import NAMINGS
from repvgg_jax.weights.tree import leaves
from tests.helpers.jit import quick_jit
from tests.helpers.pth_writer import write_zip
from tests.helpers.trees import random_images, random_variables

PARAMETERS = {  # training form, deploy form
    "mobileone_s0": (5_293_272, 2_078_504),
    "mobileone_s1": (4_825_192, 4_764_840),
    "mobileone_s2": (7_884_648, 7_808_168),
    "mobileone_s3": (10_170_600, 10_078_312),
    "mobileone_s4": (14_951_248, 14_838_352),
    "qarepvgg_a0": (9_103_304, 8_309_384),
    "qarepvgg_b0": (15_808_616, 14_339_048),
    "qarepvgg_b1g4": (39_947_368, 36_125_416),
    "repopt_b1": (51_841_832, 51_829_480),
    "repopt_b2": (80_330_536, 80_315_112),
    "repopt_l1": (76_037_928, 76_018_920),
    "repopt_l2": (118_132_776, 118_109_032),
    "repvit_m0_6": (2_808_932, 2_468_072),
    "repvit_m0_9": (5_489_328, 5_067_056),
    "repvit_m1_0": (7_302_796, 6_810_312),
    "repvit_m1_1": (8_802_912, 8_244_312),
    "repvit_m1_5": (14_644_432, 14_049_992),
    "repvit_m2_3": (23_688_792, 22_926_792),
}
NAMES = {  # digests of names and shapes, which never change: checkpoints outlive versions
    "mobileone_s0": ("f855bccbbc03", "95c55b1d32e1"),
    "mobileone_s4": ("8581592791a4", "e16b48c70fa9"),
    "qarepvgg_b1g4": ("8b7420568e87", "5ab888af8047"),
    "repopt_b1": ("ddce3511e7c3", "8eac9218e97a"),
    "repopt_b1_search": ("91319979329a", "8eac9218e97a"),
    "repvit_m0_9": ("4dfdd45b2d5b", "547e8edc73a0"),
}
KINDS = tuple(NAMES)


def tiny(name):
    """The same kind of network, small."""
    variant = rv.get_variant(name)
    se = variant.se and dataclasses.replace(variant.se, reduction=4)
    sizes = {"depths": (2, 1, 6, 1), "channels": (8, 8, 8, 16), "strides": (1, 2, 2, 2)}
    return dataclasses.replace(variant, stem_channels=8, se=se, **sizes)


@pytest.mark.core
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_both_forms(name):
    found = rv.cost(name)
    assert (found.params_train, found.params_deploy) == PARAMETERS[name]


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_tree_names_never_change(name):
    for deploy, digest in zip((False, True), NAMES[name], strict=True):
        ours = leaves(rv.get_variant(name), deploy=deploy, num_classes=1000)
        lines = sorted(f"{'/'.join(leaf.path)} {list(leaf.shape)}" for leaf in ours)
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12] == digest, lines[:20]


@pytest.mark.parametrize("name", KINDS)
def test_leaves_and_cost_are_those_of_the_model(name):
    variant = tiny(name)
    for deploy in (False, True):
        model = rv.create_model(variant, deploy=deploy, num_classes=5)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        paths, _ = jax.tree_util.tree_flatten_with_path(shapes)
        ours = leaves(variant, deploy=deploy, num_classes=5)
        assert {tuple(p.key for p in path): leaf.shape for path, leaf in paths} == {
            leaf.path: leaf.shape for leaf in ours
        }
        counted = rv.cost(variant, num_classes=5)
        total = counted.params_deploy if deploy else counted.params_train
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == total


@pytest.mark.parametrize("name", KINDS)
def test_fused_networks_are_the_networks_and_become_trainable_again(name):
    variant = tiny(name)
    images = random_images((2, 32, 32, 3))
    model = rv.create_model(variant, num_classes=5, lowering="plain", output_stride=4)
    variables = random_variables(model)
    expected = quick_jit(model.apply)(variables, images)
    fused = model.fuse(variables)
    got = quick_jit(model.clone(deploy=True).apply)(fused, images)
    scale = float(jnp.abs(expected).max())
    chex.assert_trees_all_close(got, expected, atol=1e-5 * scale)
    again = reparam.unfuse_params(
        fused, like=variables, blocks=variant.blocks, geometries=variant.geometries()
    )
    chex.assert_trees_all_close(model.fuse(again), fused, atol=1e-5, rtol=1e-4)


@pytest.mark.core
def test_output_strides_keep_the_parameters():
    """The depthwise block that loses its stride keeps being without an identity."""
    layers = rv.get_variant("mobileone_s1").layers(output_stride=8)
    plain = rv.get_variant("mobileone_s1").layers()
    assert [layer.identity for layer in layers] == [layer.identity for layer in plain]
    assert [layer.dilation for layer in layers if layer.stage == "stage4"] == [4, 4]
    assert sum(layer.identity for layer in plain) == 17 + 17  # 21 of each, 4 change shape


@pytest.mark.core
@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("MobileOne-S0", "mobileone_s0"),
        ("RepOpt-VGG-B1", "repopt_b1"),
        ("QARepVGG-B1g4", "qarepvgg_b1g4"),
        ("RepViT-M0.9", "repvit_m0_9"),
    ],
)
def test_spellings(spelling, name):
    assert rv.get_variant(spelling) is rv.FAMILY[name]


def test_a_block_is_a_function_of_the_layer():
    plain = reparam.ABLATIONS["no 1x1"]
    variant = rv.Variant(
        "mixed",
        (2,),
        (8,),
        stem_channels=8,
        block=lambda layer: plain if layer.index else reparam.REPVGG,
    )
    assert [layer.block for layer in variant.layers()] == [reparam.REPVGG, reparam.REPVGG, plain]
    model = rv.create_model(variant, num_classes=3)
    variables = random_variables(model)
    assert "conv1x1" not in variables["params"]["stage1_block1"]
    x = random_images((1, 16, 16, 3))
    got = model.clone(deploy=True).apply(model.fuse(variables), x)
    expected = model.apply(variables, x)
    chex.assert_trees_all_close(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def two_layers(first=None, second=None, stem=None):
    """A block of two layers in the place of each; the changes are those of a mistake."""

    def block(layer):
        if layer.in_channels is None:
            return (dataclasses.replace(layer, **stem or {}),)
        pair = dataclasses.replace(layer, in_channels=layer.features, stride=1, identity=True)
        return (
            dataclasses.replace(layer, **first or {}),
            dataclasses.replace(pair, **second or {}),
        )

    return block


@pytest.mark.core
@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            two_layers(second={"in_channels": 4, "identity": False}),
            r"stage1_block1 takes 4 channels \(in_channels\), but stage1_block0 gives 16",
        ),
        (two_layers(first={"features": 8}), "block1 takes 16 .* stage1_block0 gives 8"),
        (
            two_layers(second={"features": 8, "identity": False}),
            r"stage1_block3, the last layer, gives 8 .*, not 16|block2 takes 16 .* gives 8",
        ),
        (two_layers(stem={"in_channels": 3}), "stem takes 3 channels .*is the first layer: .*None"),
        (two_layers(stem={"stride": 1}), "strides of its layers multiply to 2, not to 4"),
        (two_layers(first={"identity": True}), "block0 has identity=True, but 8 channels in, 16"),
        (two_layers(second={"residual": 7}), "block1 has residual=7; it must be 0, .* up to 2 "),
        (two_layers(second={"residual": -1}), "layer stage1_block0: residual=-1|residual=-1"),
        (two_layers(second={"dilation": 2}), "block1 has dilation=2, but dilations follow"),
        (two_layers(second={"block": "acb"}), "block='acb' must be a BlockSpec"),
        (two_layers(second={"se": 4}), "se=4 must be a SqueezeExcite"),
        (two_layers(stem={"groups": 2}), "stem, the first layer, has 2 groups; it must have 1"),
        (two_layers(second={"residual": 2}), "block0 takes 8 .* gives 16 at a stride of 2"),
        (two_layers(second={"groups": 3}), "16 channels in, which 3 groups do not divide"),
    ],
)
def test_layers_that_do_not_follow_each_other(block, message):
    with pytest.raises(ValueError, match=f"variant 'x': .*{message}"):
        rv.Variant("x", (2,), (16,), stem_channels=8, block=block)


@pytest.mark.core
def test_layers_that_follow_each_other():
    block = two_layers(second={"residual": np.int64(1)})
    variant = rv.Variant("x", (2,), (16,), stem_channels=8, block=block)
    assert [layer.in_channels for layer in variant.layers()] == [None, 8, 16, 16, 16]
    model = rv.create_model(variant, num_classes=3)
    counted = rv.cost(variant, num_classes=3, image_size=16)
    variables = random_variables(model, size=16)
    assert counted.params_train == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.core
def test_a_function_cannot_be_saved():
    variant = rv.Variant("x", (1,), (8,), stem_channels=8, block=lambda layer: reparam.REPVGG)
    with pytest.raises(ValueError, match="'x' has a function as block"):
        variant.as_dict()
    saved = rv.get_variant("mobileone_s4").as_dict()
    assert rv.Variant(**saved) == rv.FAMILY["mobileone_s4"]


@pytest.mark.core
def test_an_unknown_block():
    with pytest.raises(ValueError, match="'mobilone'; did you mean 'mobileone'"):
        rv.Variant("x", (1,), (8,), stem_channels=8, block="mobilone")


class TestCheckpoints:
    @pytest.mark.parametrize("name", KINDS)
    def test_written_files_are_read_back(self, name, tmp_path):
        variant = tiny(name)
        for deploy in (False, True):
            model = rv.create_model(variant, num_classes=5, deploy=deploy)
            variables = random_variables(model)
            for naming in NAMINGS:
                if not naming.covers(variant):
                    continue
                state = rv.to_state_dict(variables, family=naming.family, variant=variant)
                write_zip(tmp_path / "model.pth", state, wrapper="state_dict")
                path = tmp_path / "model.pth"
                found = rv.load_weights(path, variant=variant, epsilon=1e-3)
                assert (found.deploy, found.family, found.epsilon) == (deploy, naming.family, 1e-3)
                chex.assert_trees_all_equal(found.variables, variables)

    @pytest.mark.core
    @pytest.mark.parametrize(
        "name",
        [
            *("mobileone_s0", "qarepvgg_a0", "repopt_b1", "repopt_b1_search"),
            *("repvit_m0_9", "repvit_m0_9_single"),
        ],
    )
    def test_networks_are_told_apart_by_their_keys(self, name):
        variant = rv.get_variant(name)
        for naming in NAMINGS:
            if naming.covers(variant):
                entries = naming.entries(variant, deploy=False, num_classes=7)
                found = detect({entry.key: entry.shape for entry in entries})
                assert (found.variant.name, found.family) == (name, naming.family)

    @pytest.mark.core
    @pytest.mark.parametrize(
        ("name", "family", "keys"),
        [
            (
                "mobileone_s4",
                "official",
                "stage0.rbr_conv.0.conv.weight stage1.0.rbr_scale.bn.bias linear.weight "
                "stage1.3.rbr_skip.running_var stage3.10.se.reduce.weight stage4.1.se.expand.bias",
            ),
            (
                "mobileone_s4",
                "mmpretrain",
                "backbone.stage0.branch_conv_list.0.norm.weight head.fc.weight "
                "backbone.stage3.19.se.conv1.conv.weight backbone.stage1.3.branch_norm.weight",
            ),
            ("mobileone_s0", "timm", "stages.2.19.conv_kxk.3.conv.weight stem.conv_scale.bn.bias"),
            (
                "repvit_m0_9",
                "timm",
                "stem.conv2.c.weight stages.0.blocks.1.token_mixer.conv.bn.running_mean "
                "stages.1.downsample.pre_block.channel_mixer.conv2.c.weight head.head.l.weight "
                "stages.3.downsample.ffn.conv1.bn.bias stages.2.blocks.12.se.fc2.weight "
                "stages.2.blocks.13.token_mixer.conv1.bias head.head_dist.bn.weight",
            ),
            (
                "repvit_m0_9",
                "official",
                "features.0.2.c.weight features.2.token_mixer.0.conv.bn.running_mean "
                "features.3.channel_mixer.m.2.c.weight classifier.classifier.l.weight "
                "features.24.channel_mixer.m.0.bn.bias features.21.token_mixer.1.fc2.weight "
                "features.22.token_mixer.0.conv1.bias classifier.classifier_dist.bn.weight "
                "features.24.token_mixer.0.c.weight features.24.token_mixer.2.bn.running_var",
            ),
            ("qarepvgg_a0", "official", "stage1.0.rbr_1x1.weight stage4.0.bn.running_mean"),
            ("repopt_b1", "official", "stage3.15.conv.weight stage0.bn.bias linear.bias"),
            (
                "repopt_b1_search",
                "official",
                "stage1.1.scale_identity.weight stage0.scale_conv.weight stage4.0.conv_1x1.weight",
            ),
        ],
    )
    def test_keys_are_the_projects_own(self, name, family, keys):
        variant = rv.get_variant(name)
        naming = next(n for n in NAMINGS if n.family == family and n.covers(variant))
        found = {e.key for e in naming.entries(variant, deploy=False, num_classes=7)}
        assert found >= set(keys.split())
        assert "stage3.9.se.reduce.weight" not in found  # S4: the last five units alone

    def test_a_deploy_checkpoint_can_be_trained_again(self):
        variant = rv.get_variant("qarepvgg_a0")
        model = rv.create_model(variant, num_classes=3)
        fresh = random_variables(model)
        fused = model.fuse(random_variables(model, seed=1))
        state = rv.to_state_dict(fused, variant=variant)
        merged = rv.merge_weights(rv.load_weights(state, variant=variant), fresh)
        again = model.fuse(merged.variables)
        chex.assert_trees_all_close(again, fused, atol=1e-4, rtol=1e-3)

    def test_scales_of_the_authors(self, tmp_path):
        """In memory, and in a file of either kind, alone or beside other entries."""
        variant = tiny("repopt_b1_search")
        variables = random_variables(rv.create_model(variant, num_classes=3))
        state = rv.to_state_dict(variables, variant=variant)
        alone = {key: value for key, value in state.items() if ".scale_" in key}
        found = rv.load_scales({"model": alone})
        expected = reparam.extract_scales(reparam.repopt_search(), variables["params"])
        chex.assert_trees_all_equal(found, expected)
        write_zip(tmp_path / "scales.pth", state, wrapper="model")
        safetensors.numpy.save_file(alone, tmp_path / "scales.safetensors")
        for path in tmp_path.iterdir():
            chex.assert_trees_all_equal(rv.load_scales(path), expected)
        both = {"model": alone, "ema": {key: 2 * value for key, value in alone.items()}}
        chex.assert_trees_all_equal(rv.load_scales(both, entry="model"), expected)
        with pytest.raises(ValueError, match="entry="):
            rv.load_scales(both)
        with pytest.raises(ValueError, match=r"no scales.*linear.bias"):
            rv.load_scales({"linear.bias": state["linear.bias"]})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "mobileone_s4"])
def test_parity_with_timm(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    reference = timm.create_model(name, num_classes=7).eval()
    state = reference.state_dict()
    renamed = {"running_mean": "mean", "running_var": "var"}
    rng = np.random.default_rng(0)
    for key, value in state.items():
        if key.endswith(("running_mean", "running_var", "bias")):
            leaf = renamed.get(key.rpartition(".")[2], "bias")
            new = (
                rng.uniform(0.5, 2, value.shape)
                if leaf == "var"
                else rng.normal(0, 0.1, value.shape)
            )
            value.copy_(torch.tensor(new))
        elif value.ndim == 1:
            value.copy_(torch.tensor(rng.uniform(0.3, 0.7, value.shape)))
    images = random_images((2, 64, 64, 3))
    with torch.no_grad():
        expected = reference(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    loaded = rv.load_weights(state)
    assert (loaded.variant, loaded.family) == (name, "timm")
    model = rv.create_model(name, num_classes=7)
    scale = np.abs(expected).max()
    got = jax.jit(model.apply)(loaded.variables, images)
    np.testing.assert_allclose(got, expected, atol=1e-5 * scale)
    fused = model.fuse(loaded.variables)
    deployed = timm.utils.reparameterize_model(reference).state_dict()
    theirs = rv.load_weights(deployed)
    assert theirs.deploy
    chex.assert_trees_all_close(theirs.variables, fused, atol=1e-5)
    assert rv.to_state_dict(fused, family="timm", variant=name).keys() == deployed.keys()
