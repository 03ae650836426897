"""Weights in memory: other projects' names, detection, loading, saving, merging, the hub."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax.traverse_util import flatten_dict

import repvgg_jax as rv
from repvgg_jax import reparam
from repvgg_jax.weights.detect import detect
from repvgg_jax.weights.names import FAMILIES, NAMINGS, OFFICIAL, naming_for
from repvgg_jax.weights.tree import leaves
from tests.helpers.weights_samples import (
    CLASSES,
    TINY,
    assert_identical,
    has_names,
    random_weights,
    refusal,
    thin,
)

pytestmark = pytest.mark.core

# Of each model as its own project builds it: how many keys, and the SHA-256 of its sorted
# lines "key 64x3x3x3".
DIGESTS = json.loads(pathlib.Path(__file__).with_name("state_dict_digests.json").read_text())

FORMS = pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])


@pytest.fixture
def variables():
    return random_weights(TINY)


@pytest.fixture(scope="module")
def state():
    return rv.to_state_dict(random_weights(TINY), variant=TINY)


def without_head(variables):
    params = {k: v for k, v in variables["params"].items() if k != "head"}
    return {**variables, "params": params}


# Names and layouts of other projects, compared with the keys and shapes of their own models.


@pytest.mark.parametrize("model", DIGESTS)
def test_keys_and_shapes_are_the_projects_own(model):
    family, name, form = model.split("/")
    variant = rv.get_variant(name.replace("RepVGGplus", "plus"))
    entries = naming_for(family, variant).entries(
        variant, deploy=form == "deploy", num_classes=1000
    )
    lines = sorted(f"{entry.key} {'x'.join(map(str, entry.shape))}" for entry in entries)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert [len(lines), digest] == DIGESTS[model], lines[:20]


def test_the_digests_cover_all_published_models():
    official = {m for m in DIGESTS if m.startswith(("official/RepVGG", "timm/repvgg"))}
    assert len(official) == 2 * len(rv.VARIANTS) + 2 * 11
    # Of RepOpt-VGG the authors have no deploy form, and of QARepVGG no networks of these sizes.
    others = {tuple(m.split("/")[:2]) for m in DIGESTS.keys() - official}
    assert {name for _, name in others} == rv.FAMILY.keys() - {
        *("qarepvgg_b2g2", "qarepvgg_b3", "qarepvgg_b3g2", "qarepvgg_b3g4")
    }
    assert {name for family, name in others if family == "timm"} == {
        *(name for name in rv.FAMILY if name.startswith(("mobileone", "repvit_m1"))),
        *("repvit_m0_9", "repvit_m2_3"),  # timm has no m0_6
    }


@FORMS
@pytest.mark.parametrize("name", ["A0", "B1g4", "plus-L2pse"])
def test_leaves_are_those_of_the_model(name, deploy):
    model = rv.create_model(name, deploy=deploy)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    ours = leaves(rv.get_variant(name), deploy=deploy, num_classes=1000)
    assert {leaf.path: leaf.shape for leaf in ours} == {
        path: leaf.shape for path, leaf in flatten_dict(shapes).items()
    }


def test_mmpretrain_names():
    """A few keys of each kind; there is no digest of this project's models."""
    variant = rv.get_variant("D2se")
    entries = naming_for("mmpretrain", variant).entries(variant, deploy=False, num_classes=1000)
    shapes = {entry.key: entry.shape for entry in entries}
    assert shapes["backbone.stem.branch_3x3.conv.weight"] == (64, 3, 3, 3)
    assert shapes["backbone.stem.branch_1x1.norm.running_var"] == (64,)
    assert shapes["backbone.stage_1.7.branch_norm.weight"] == (160,)
    assert shapes["backbone.stage_3.23.branch_norm.num_batches_tracked"] == ()
    assert shapes["backbone.stage_4.0.se_layer.conv1.conv.weight"] == (160, 2560, 1, 1)
    assert shapes["backbone.stage_4.0.se_layer.conv2.conv.bias"] == (2560,)
    assert shapes["head.fc.weight"] == (1000, 2560)


def test_a_family_without_names_for_a_network_is_told_those_that_have_them():
    with pytest.raises(ValueError, match="use family='official' or 'timm' or 'flax'"):
        naming_for("mmpretrain", rv.FAMILY["repvit_m0_9"])


@FORMS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["A0", "B1g4", "D2se", "plus-L2pse"])
def test_a_round_trip_is_the_identity(name, family, deploy):
    variant = thin(rv.VARIANTS[name])
    variables = random_weights(variant, deploy=deploy)
    if not has_names(family, variant):
        with pytest.raises(ValueError, match=f"{family} has no names .*{name}"):
            rv.to_state_dict(variables, family=family, variant=variant)
        return
    state = rv.to_state_dict(variables, family=family, variant=variant)
    loaded = rv.load_weights(state, variant=variant)
    assert (loaded.deploy, loaded.num_classes, loaded.family) == (deploy, CLASSES, family)
    assert_identical(loaded.variables, variables)
    again = rv.to_state_dict(loaded.variables, family=family, variant=variant)
    assert_identical(again, state)


def test_num_batches_tracked_is_dropped_and_written_as_zero():
    variant = rv.Variant("one", (1,), (8,), stem_channels=4)
    state = rv.to_state_dict(random_weights(variant), variant=variant)
    key = "stage0.rbr_dense.bn.num_batches_tracked"
    assert state[key].dtype == np.int64
    assert state[key].shape == ()
    assert state[key] == 0
    for count in (None, np.int64(120_000)):
        other = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        if count is not None:
            other[key] = count
        loaded = rv.load_weights(other, variant=variant)
        assert_identical(rv.to_state_dict(loaded.variables, variant=variant), state)


def test_a_stage_split_more_than_once_has_no_official_names():
    taps = ("stage1_block0", "stage1_block1")
    variant = rv.Variant("split", (3,), (8,), stem_channels=8, auxiliary=taps)
    assert not OFFICIAL.covers(variant)
    with pytest.raises(ValueError, match=r"official has no names .*split"):
        naming_for("official", variant)


class TwoBlocks(rv.Variant):
    """Blocks of other kinds, alternating."""

    def layers(self, output_stride=None):
        specs = itertools.cycle((reparam.mobileone(3, branches=2), reparam.ACB))
        layers = super().layers(output_stride)
        return tuple(dataclasses.replace(a, block=b) for a, b in zip(layers, specs, strict=False))


@FORMS
def test_blocks_of_other_kinds_have_flax_names(deploy):
    variant = TwoBlocks("two", (2, 2), (8, 12), stem_channels=4, groups=2)
    variables = random_weights(variant, deploy=deploy)
    state = rv.to_state_dict(variables, family="flax", variant=variant)
    loaded = rv.load_weights(state, variant=variant)
    assert (loaded.deploy, loaded.family) == (deploy, "flax")
    assert_identical(loaded.variables, variables)
    with pytest.raises(ValueError, match="timm has no names"):
        rv.to_state_dict(variables, family="timm", variant=variant)
    del state["params/stage1_block0/bn1x3/scale" if not deploy else "params/stem/reparam/bias"]
    assert "1 missing" in refusal(state, variant=variant)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"'keras'.*official, timm, mmpretrain, flax"):
        naming_for("keras", rv.get_variant("A0"))


# Detection.


@FORMS
@pytest.mark.parametrize("naming", NAMINGS, ids=range(len(NAMINGS)))
def test_every_official_variant_is_detected_from_keys_and_shapes(naming, deploy):
    for name, variant in rv.VARIANTS.items():
        if naming.covers(variant):
            entries = naming.entries(variant, deploy=deploy, num_classes=7, in_channels=4)
            found = detect({entry.key: entry.shape for entry in entries})
            assert found == (variant, deploy, 7, 4, naming.family, entries, "", ()), name


def test_missing_unexpected_and_misshaped_keys_are_listed(state):
    damaged = dict(state)
    del damaged["stage1.0.rbr_dense.conv.weight"]
    del damaged["stage1.0.rbr_1x1.bn.running_var"]
    damaged["stage9.0.rbr_dense.conv.weight"] = state["stage0.rbr_dense.conv.weight"]
    damaged["linear.weight"] = state["linear.weight"].T
    message = refusal(damaged)
    assert "nearest to tiny (official names, training form)" in message
    assert "2 missing [stage1.0.rbr_dense.conv.weight, stage1.0.rbr_1x1.bn.running_var]" in message
    assert "1 unexpected [stage9.0.rbr_dense.conv.weight]" in message
    assert "1 misshaped [linear.weight (12, 5) instead of (5, 12)]" in message


def test_half_a_checkpoint(state):
    keys = list(state)[: len(state) // 2]
    message = refusal({key: state[key] for key in keys})
    assert "nearest to tiny" in message
    assert "without a classifier" in message
    assert " missing [stage2" in message


@pytest.mark.parametrize("name", ["A1", "B2g4", "D2se"])
def test_half_a_checkpoint_of_an_official_variant_names_it(name):
    entries = naming_for("timm", rv.VARIANTS[name]).entries(
        rv.VARIANTS[name], deploy=False, num_classes=1000
    )
    shapes = {entry.key: entry.shape for entry in entries}
    for kept in (list(shapes)[: len(shapes) // 2], list(shapes)[len(shapes) // 2 :]):
        with pytest.raises(ValueError, match=rf"nearest to {name} \(timm .* missing"):
            detect({key: shapes[key] for key in kept})


def test_half_fused_is_neither_form(state, variables):
    fused = rv.to_state_dict(rv.fuse_params(variables), variant=TINY)
    stem = {k: v for k, v in fused.items() if k.startswith("stage0.rbr_reparam")}
    assert "2 unexpected [stage0.rbr_reparam.weight" in refusal({**state, **stem})


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"], "a ResNet"),
        (["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"], "a vision transformer"),
        (["features.0.weight", "classifier.0.weight"], "a plain VGG or AlexNet"),
        (["stem.conv_scale.conv.weight", "stem.conv_kxk.0.conv.weight"], "a MobileOne"),
    ],
)
def test_other_architectures_are_named(keys, what):
    arrays = {key: np.zeros((4, 3, 3, 3), np.float32) for key in keys}
    assert what in refusal(arrays, variant=None)


def test_unknown_networks_show_their_keys():
    message = refusal({"encoder_a.w": np.zeros(3)}, variant=None)
    assert "not a RepVGG" in message
    assert "[encoder_a.w]" in message
    # A few known keys are not enough.
    strange = {f"layers.{index}.w": np.zeros(3) for index in range(9)}
    strange["stem.conv_kxk.conv.weight"] = np.zeros((64, 3, 3, 3))
    assert "not a RepVGG" in refusal(strange, variant=None)


def test_another_variant_than_expected():
    state = rv.to_state_dict(random_weights(rv.VARIANTS["A1"], deploy=True))
    message = refusal(state, variant="B0")
    assert "nearest to B0 (official names, deploy form), but 12 missing" in message
    # RepVGGplus has official names of its own, in which there is no B0.
    plus = random_weights(thin(rv.VARIANTS["plus-L2pse"]))
    state = rv.to_state_dict(plus, variant=thin(rv.VARIANTS["plus-L2pse"]))
    message = refusal(state, variant="B0")
    assert "(8, 14, 24, 1)" in message
    assert "does not fit B0" in message


def test_an_architecture_of_your_own_is_asked_for(state):
    message = refusal(state, variant=None)
    assert "depths (1, 2), channels (8, 12), stem_channels 4" in message
    assert "variant=" in message


@FORMS
@pytest.mark.parametrize("family", ["official", "timm", "flax"])
def test_networks_with_a_width_per_block(family, deploy):
    """As channel pruning leaves them."""
    pruned = rv.Variant("pruned", (2, 2), ((8, 6), (10, 10)), stem_channels=8)
    variables = random_weights(pruned, deploy=deploy)
    state = rv.to_state_dict(variables, family=family, variant=pruned)
    assert_identical(rv.load_weights(state, variant=pruned).variables, variables)
    message = refusal(state, variant=None)
    assert "depths (2, 2), channels ((8, 6), 10), stem_channels 8" in message


# Loading.


@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("ema",), ("ema", "model")])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_removed(wrappers, prefix, state, variables):
    saved = {prefix + key: array for key, array in state.items()}
    for wrapper in wrappers:
        saved = {"epoch": 119, wrapper: saved, "optimizer": {"state": {}}}
    assert_identical(rv.load_weights(saved, variant=TINY).variables, variables)


def test_several_state_dicts_need_an_entry(state, variables):
    other = {key: array + 1 for key, array in state.items()}
    both = {"model": other, "ema": state}
    message = refusal(both)
    assert "model and ema" in message
    assert "entry='model'" in message
    assert_identical(rv.load_weights(both, variant=TINY, entry="ema").variables, variables)
    message = refusal(both, entry="net")
    assert "'net'" in message
    assert "model, ema" in message


def test_a_state_dict_is_found_by_what_it_holds(state, variables):
    saved = {"epoch": 3, "best": {"weights_of_net": {"net.0." + k: v for k, v in state.items()}}}
    loaded = rv.load_weights({**saved, "optimizer": {"state": {0: {}}}}, variant=TINY)
    assert_identical(loaded.variables, variables)
    assert loaded.unused == ("epoch (a int)", "optimizer (a dict)")
    other = {"ckpt": {"net": state, "ema": {key: array + 1 for key, array in state.items()}}}
    assert "entry='ckpt/net'" in refusal(other)
    assert_identical(rv.load_weights(other, variant=TINY, entry="ckpt/net").variables, variables)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "flax"])
@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "module.student.0._orig_mod."])
def test_a_network_inside_another_one(prefix, family, variables):
    state = rv.to_state_dict(variables, family=family, variant=TINY)
    backbone = {prefix + k: v for k, v in state.items() if not k.startswith(("linear", "head"))}
    others = {
        **{"n_averaged": np.int64(3), "neck.convs.0.weight": np.zeros((8, 8, 1, 1))},
        **{f"{prefix}bbox_head.cls.bias": np.zeros(4), "step": 7},
    }
    loaded = rv.load_weights({**others, **backbone}, variant=TINY, num_classes=0)
    assert loaded.family == family
    assert_identical(loaded.variables, without_head(variables))
    assert loaded.unused == (*list(others)[:3], "step (a int)")
    message = refusal({**others, **backbone})
    assert "no classifier" in message
    assert "neck.convs.0.weight" in message
    # What belongs to the backbone must be complete, and nothing more.
    first = next(iter(backbone))
    assert "1 missing" in refusal({**others, **{k: v for k, v in backbone.items() if k != first}})
    extra = {first.replace("weight", "scale"): backbone[first]}
    assert "1 unexpected" in refusal({**others, **backbone, **extra})


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("timm", "stages.", "stages_"),  # timm.create_model(…, features_only=True)
        ("mmpretrain", "backbone.", ""),  # the state dict of a detector's backbone
        ("mmpretrain", "backbone.", "model.img_backbone."),
    ],
)
def test_names_of_backbones_alone(family, before, after, variables):
    state = rv.to_state_dict(variables, family=family, variant=TINY)
    renamed = {k.replace(before, after): v for k, v in state.items() if "head" not in k}
    loaded = rv.load_weights(renamed, variant=TINY, num_classes=0)
    assert (loaded.family, loaded.unused) == (family, ())
    assert_identical(loaded.variables, without_head(variables))


def test_two_networks_in_one_state_dict(state, variables):
    both = {f"student.{key}": array for key, array in state.items()}
    both |= {f"teacher.{key}": array + 1 for key, array in state.items()}
    assert "prefixes student., teacher.; choose with entry='student.'" in refusal(both)
    loaded = rv.load_weights({"model": both, "epoch": 1}, variant=TINY, entry="student.")
    assert_identical(loaded.variables, variables)
    assert len(loaded.unused) == len(state) + 1


def test_what_stands_in_the_way_is_named(state):
    key = "stage1.0.rbr_dense.conv.weight"
    message = refusal({**state, key: "a quantized tensor"})
    assert f"1 missing [{key}]" in message
    assert f"no arrays: {key} is a str" in message


@FORMS
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_images_of_other_channels_than_the_checkpoints(channels, deploy, variables, rng):
    """The rule of timm: summed for one channel, else repeated in turn and scaled."""
    taken = rv.fuse_params(variables) if deploy else variables
    state = rv.to_state_dict(taken, variant=TINY)
    loaded = rv.load_weights(state, variant=TINY, in_channels=channels)
    assert loaded.in_channels == channels
    for name, child in loaded.variables["params"]["stem"].items():
        if "kernel" in child:
            own = taken["params"]["stem"][name]["kernel"]
            if channels == 1:
                wanted = own.sum(axis=2, keepdims=True)
            else:
                wanted = np.concatenate([own] * 3, axis=2)[:, :, :channels] * (3 / channels)
            np.testing.assert_allclose(child["kernel"], wanted, rtol=1e-6)
    rest = [{**tree["params"], "stem": {}} for tree in (loaded.variables, taken)]
    assert_identical(*rest)
    again = rv.load_weights(rv.to_state_dict(loaded.variables, variant=TINY), variant=TINY)
    assert again.in_channels == channels


def test_one_channel_is_the_network_on_images_that_repeat_it(variables, rng):
    state = rv.to_state_dict(variables, variant=TINY)
    gray = rng.normal(size=(2, 16, 16, 1)).astype(np.float32)
    one = rv.load_weights(state, variant=TINY, in_channels=1).variables
    expected = FEATURES(without_head(variables), np.repeat(gray, 3, axis=-1))
    found = FEATURES(without_head(one), gray)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_impossible_channels(state):
    assert "in_channels=0" in refusal(state, in_channels=0)

    class Normed(rv.Variant):
        """With a norm of the images."""

        def layers(self, output_stride=None):
            stem, *others = super().layers(output_stride)
            norm = reparam.Chain((reparam.Norm("bn"), reparam.Conv("conv", (3, 3))))
            block = reparam.BlockSpec("normed", train=norm)
            return (dataclasses.replace(stem, block=block), *others)

    variant = Normed("normed", (1,), (8,), stem_channels=4)
    own = rv.to_state_dict(random_weights(variant), family="flax", variant=variant)
    assert "stem/bn" in refusal(own, variant=variant, in_channels=1)


def test_jax_arrays_are_arrays(state, variables):
    arrays = {key: jnp.asarray(array) for key, array in state.items() if array.ndim}
    assert_identical(rv.load_weights(arrays, variant=TINY).variables, variables)


def test_a_loaded_checkpoint_runs_and_fuses(state, rng):
    loaded = rv.load_weights(state, variant=TINY)
    assert str(loaded) == "tiny, training form, 5 classes, official names"
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    model = rv.create_model(TINY, num_classes=CLASSES)
    logits = jax.jit(model.apply)(loaded.variables, images)
    fused = rv.fuse_params(loaded.variables)
    found = jax.jit(model.clone(deploy=True).apply)(fused, images)
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    again = rv.load_weights(rv.to_state_dict(fused, variant=TINY), variant=TINY)
    assert again.deploy
    assert_identical(again.variables, fused)


def test_another_number_of_classes_explains_how_to_load_the_backbone(state, variables):
    message = refusal(state, num_classes=10)
    assert f"tiny has {CLASSES} classes, not 10" in message
    assert "num_classes=0" in message
    loaded = rv.load_weights(state, variant=TINY, num_classes=0)
    assert loaded.num_classes == 0
    assert_identical(loaded.variables, without_head(variables))
    backbone = {k: v for k, v in state.items() if not k.startswith("linear")}
    message = refusal(backbone)
    assert "no classifier" in message
    assert "num_classes=0" in message
    again = rv.load_weights(backbone, variant=TINY, num_classes=0)
    assert_identical(again.variables, without_head(variables))


def test_auxiliary_heads_are_dropped_with_the_head():
    variant = rv.Variant("aux", (1,), (8,), stem_channels=8, auxiliary=("stage1_block0",))
    state = rv.to_state_dict(random_weights(variant), variant=variant)
    assert "stage1_aux.0.bn.weight" in state
    loaded = rv.load_weights(state, variant=variant, num_classes=0)
    assert loaded.variables["params"].keys() == {"stem", "stage1_block0"}
    assert loaded.variables["batch_stats"].keys() == {"stem", "stage1_block0"}


@FORMS
@pytest.mark.parametrize("family", ["official", "flax"])
def test_images_with_another_number_of_channels(family, deploy):
    variables = random_weights(TINY, deploy=deploy, in_channels=1)
    state = rv.to_state_dict(variables, family=family, variant=TINY)
    loaded = rv.load_weights(state, variant=TINY)
    assert loaded.in_channels == 1
    assert_identical(loaded.variables, variables)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_, np.complex64])
def test_other_dtypes_are_refused(dtype, state):
    key = "stage1.0.rbr_dense.conv.weight"
    message = refusal({**state, key: state[key].astype(dtype)})
    assert key in message
    assert np.dtype(dtype).name in message
    assert "float16, bfloat16" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad, state):
    key = "stage1.0.rbr_dense.conv.weight"
    damaged = state[key].copy()
    damaged[1, 2, 0, 0] = bad
    message = refusal({**state, key: damaged})
    assert f"{key}: 1 of {damaged.size} elements are NaN or infinite" in message


def test_float64_beyond_float32_is_refused(state):
    assert "infinite" in refusal({**state, "linear.bias": np.full(CLASSES, 1e300)})


def test_a_negative_variance_is_refused(state):
    key = next(k for k in state if k.endswith("running_var"))
    message = refusal({**state, key: -np.ones_like(state[key])})
    assert key in message
    assert "-1" in message


def test_keys_with_line_feeds_stay_on_one_line():
    assert "a b, c" in refusal({"a\nb": np.zeros(3), "c": np.zeros(3)})


# Saving.


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_file_loads_bitwise_identical(suffix, family, tmp_path, variables):
    path = tmp_path / "new" / f"weights{suffix}"
    rv.save_weights(path, jax.tree.map(jnp.asarray, variables), family=family, variant=TINY)
    loaded = rv.load_weights(path, variant=TINY)
    assert loaded.family == family
    assert_identical(loaded.variables, variables)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if suffix == ".safetensors":  # without this, PyTorch projects refuse the file
        with safetensors.safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_failed_save_leaves_the_older_file(tmp_path, variables, monkeypatch):
    path = tmp_path / "weights.npz"
    rv.save_weights(path, variables, variant=TINY)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(ValueError, match=r"weights\.npz .*No space left"):
        rv.save_weights(path, variables, variant=TINY)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_paths_that_cannot_be_written(suffix, tmp_path, variables):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"cannot be written"):
        rv.save_weights(file / f"weights{suffix}", variables, variant=TINY)
    path = tmp_path / f"directory{suffix}"
    path.mkdir()
    with pytest.raises(ValueError, match=r"cannot be written.*directory"):
        rv.save_weights(path, variables, variant=TINY)
    assert sorted(tmp_path.iterdir()) == sorted([path, file])


def test_unknown_suffixes_are_refused(tmp_path, variables):
    with pytest.raises(ValueError, match=r"\.safetensors, \.npz, \.pth, \.pt"):
        rv.save_weights(tmp_path / "weights.h5", variables, variant=TINY)


def test_pth_without_pytorch_names_the_extra(tmp_path, variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pip install -r requirements-torch"):
        rv.save_weights(tmp_path / "weights.pth", variables, variant=TINY)
    assert not list(tmp_path.iterdir())


def test_incomplete_variables_are_not_saved(variables):
    del variables["batch_stats"]["stem"]
    with pytest.raises(ValueError, match=r"missing \[batch_stats/stem/bn3x3/mean"):
        rv.to_state_dict(variables, variant=TINY)
    with pytest.raises(ValueError, match="stem is a str"):
        rv.to_state_dict({"stem": "?"})
    with pytest.raises(ValueError, match="not a list"):
        rv.to_state_dict([])


def test_bfloat16_is_not_saved(variables):
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    with pytest.raises(ValueError, match=r"kernel has dtype bfloat16.*astype"):
        rv.to_state_dict(cast, variant=TINY)


# Merging into freshly initialized variables.

FEATURES = jax.jit(rv.create_model(TINY, num_classes=0).apply)


def fresh(variant=TINY, num_classes=CLASSES, deploy=False):
    """As from `model.init`, which would take long to compile."""
    variables = random_weights(variant, deploy=deploy, num_classes=num_classes, seed=1)
    return jax.tree.map(jnp.asarray, variables)


def load(variables, **options):
    return rv.load_weights(rv.to_state_dict(variables, variant=TINY), variant=TINY, **options)


def test_everything_is_replaced_if_everything_fits(variables):
    merged = rv.merge_weights(load(variables), fresh())
    assert_identical(merged.variables, variables)
    assert merged.replaced == ()
    assert "tiny, training form, 5 classes, official names" in str(merged)


@pytest.mark.parametrize("backbone_only", [False, True])
def test_the_head_stays_fresh_if_the_classes_differ(backbone_only, variables):
    target = fresh(num_classes=3)
    loaded = load(variables, num_classes=0 if backbone_only else None)
    merged = rv.merge_weights(loaded, target)
    assert merged.replaced == ("head",)
    assert str(merged).endswith("freshly initialized: head")
    head = merged.variables["params"]["head"]
    assert_identical(jax.tree.map(np.asarray, head), jax.device_get(target["params"]["head"]))
    assert_identical(without_head(merged.variables), without_head(variables))


def test_a_model_without_a_head_takes_the_backbone(variables):
    merged = rv.merge_weights(load(variables), fresh(num_classes=0))
    assert_identical(merged.variables, without_head(variables))


@pytest.mark.parametrize("num_classes", [CLASSES, 3, 0])
def test_a_deploy_form_is_split_into_branches_that_compute_the_same(num_classes, variables, rng):
    deployed = rv.fuse_params(variables)
    merged = rv.merge_weights(load(deployed), fresh(num_classes=num_classes))
    assert merged.unfused
    assert "deploy form split into branches" in str(merged)
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    found, expected = (
        FEATURES(without_head(tree), images) for tree in (merged.variables, variables)
    )
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_another_epsilon_is_passed_on_and_used_to_unfuse(variables):
    deployed = rv.fuse_params(variables, epsilon=1e-3)
    loaded = load(deployed, epsilon=1e-3)
    assert loaded.epsilon == 1e-3
    assert load(deployed).epsilon == 1e-5
    start = fresh()
    tiny = jax.tree.map(lambda leaf: leaf * 1e-3, start["batch_stats"])  # where epsilon matters
    merged = rv.merge_weights(loaded, {**start, "batch_stats": tiny}).variables
    again = rv.fuse_params(merged, epsilon=1e-3)
    other = rv.fuse_params(merged, epsilon=1e-5)
    kernels = [tree["params"]["stem"]["reparam"]["kernel"] for tree in (deployed, again, other)]
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=1e-4, atol=1e-5)
    assert np.abs(kernels[2] - kernels[0]).max() > 1e-2


def test_auxiliary_heads_stay_fresh_if_they_do_not_fit():
    variant = rv.Variant("aux", (1, 1), (8, 8), stem_channels=8, auxiliary=("stage1_block0",))
    source = random_weights(variant)

    def loaded(variables):
        return rv.load_weights(rv.to_state_dict(variables, variant=variant), variant=variant)

    merged = rv.merge_weights(loaded(source), fresh(variant, 3))
    assert merged.replaced == ("aux_stage1_block0/logits", "head")
    aux = merged.variables["params"]["aux_stage1_block0"]
    assert_identical(aux["conv"], source["params"]["aux_stage1_block0"]["conv"])
    # The deploy form has none; the fresh ones, statistics included, replace them.
    target = fresh(variant)
    merged = rv.merge_weights(loaded(rv.fuse_params(source)), target)
    assert set(merged.replaced) == {
        "aux_stage1_block0/bn",
        "aux_stage1_block0/conv",
        "aux_stage1_block0/logits",
    }
    for collection in ("params", "batch_stats"):
        assert_identical(
            jax.device_get(merged.variables[collection]["aux_stage1_block0"]),
            jax.device_get(target[collection]["aux_stage1_block0"]),
        )


def test_merging_into_another_network_lists_differences(variables):
    other = rv.Variant("wider", (1, 2), (8, 16), stem_channels=4, se=rv.SqueezeExcite(4))
    with pytest.raises(ValueError, match=r"does not fit .* misshaped \[.*stage2"):
        rv.merge_weights(load(variables), fresh(other))
    with pytest.raises(ValueError, match="deploy=False"):
        rv.merge_weights(load(variables), fresh(deploy=True))


# Pretrained weights by name, from a cache that the tests fill.

COMMIT = "0" * 40


def put_into_cache(cache, name, variables):
    """Writes a file to where the hub's client keeps its downloads."""
    repository = cache / f"models--timm--{name}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    rv.save_weights(snapshot / "model.safetensors", variables, family="timm")


@pytest.fixture
def offline(monkeypatch):
    reason = "huggingface_hub is not installed (extra: hub)"
    constants = pytest.importorskip("huggingface_hub.constants", reason=reason)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_the_pretrained_names_are_timms():
    names = rv.weights.PRETRAINED
    assert sum(name.endswith("rvgg_in1k") for name in names) == 11
    for name, variant in names.items():
        network, _, tag = name.partition(".")
        assert rv.get_variant(network).name == variant
        assert tag in ("rvgg_in1k", "apple_in1k", "dist_450e_in1k", "dist_300e_in1k")
        assert has_names("timm", rv.get_variant(variant))


@pytest.mark.usefixtures("offline")
def test_names_without_a_tag(tmp_path):
    for name, tag in (("mobileone_s0", "apple_in1k"), ("repvit_m0_9", "dist_450e_in1k")):
        with pytest.raises(ValueError, match=rf"timm/{name}\.{tag}/model"):
            rv.load_pretrained(name, cache_dir=tmp_path)


@pytest.mark.usefixtures("offline")
def test_a_cached_model_loads_by_any_of_its_names(tmp_path):
    variables = random_weights(rv.VARIANTS["A0"], num_classes=1000)
    put_into_cache(tmp_path, "repvgg_a0.rvgg_in1k", variables)
    for name in ("repvgg_a0.rvgg_in1k", "timm/repvgg_a0.rvgg_in1k", "repvgg_a0"):
        loaded = rv.load_pretrained(name, cache_dir=tmp_path)
        assert (loaded.variant, loaded.deploy, loaded.num_classes) == ("A0", False, 1000)
        assert_identical(loaded.variables, variables)
    backbone = rv.load_pretrained("repvgg_a0", cache_dir=tmp_path, num_classes=0)
    assert "head" not in backbone.variables["params"]


@pytest.mark.usefixtures("offline")
def test_a_cached_file_of_another_variant_is_refused(tmp_path):
    variables = random_weights(rv.VARIANTS["A0"], deploy=True)
    put_into_cache(tmp_path, "repvgg_a1.rvgg_in1k", variables)
    with pytest.raises(ValueError, match=r"nearest to A1 .* misshaped"):
        rv.load_pretrained("repvgg_a1", cache_dir=tmp_path)


@pytest.mark.usefixtures("offline")
def test_offline_is_one_line(tmp_path):
    name = "timm/repvgg_b1g4.rvgg_in1k/model.safetensors"
    with pytest.raises(ValueError, match=f"{name} .*could not be downloaded") as caught:
        rv.load_pretrained("repvgg_b1g4.rvgg_in1k", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_pretrained_names_get_a_suggestion():
    with pytest.raises(ValueError, match=r"did you mean .*repvgg_b1g4\.rvgg_in1k.*\?"):
        rv.load_pretrained("repvgg_b1g2")
    with pytest.raises(ValueError, match=r"'resnet50'; choose from repvgg_a0"):
        rv.load_pretrained("resnet50")


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install -r requirements-hub"):
        rv.load_pretrained("repvgg_a0")
