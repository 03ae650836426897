"""Names and layouts of other projects, held to the keys and shapes of their models."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import repvgg_jax as rv
from repvgg_jax.weights.names import FAMILIES, OFFICIAL, naming_for
from repvgg_jax.weights.tree import leaves
from tests.weights_samples import CLASSES, assert_identical, random_variables, thin

# Of each model as its own project builds it: how many keys, and the SHA-256 of its sorted
# lines "key 64x3x3x3".
DIGESTS = json.loads(pathlib.Path(__file__).with_name("state_dict_digests.json").read_text())

FORMS = pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])


def variant_of(model: str) -> rv.Variant:
    return rv.get_variant(model.replace("RepVGGplus", "plus"))


def has_names(family: str, variant: rv.Variant) -> bool:
    try:
        naming_for(family, variant)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("model", DIGESTS)
def test_keys_and_shapes_are_the_projects_own(model):
    family, name, form = model.split("/")
    variant = variant_of(name)
    entries = naming_for(family, variant).entries(
        variant, deploy=form == "deploy", num_classes=1000
    )
    lines = sorted(f"{entry.key} {'x'.join(map(str, entry.shape))}" for entry in entries)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert [len(lines), digest] == DIGESTS[model], lines[:20]


def test_the_digests_are_of_all_published_models():
    assert len([m for m in DIGESTS if m.startswith("official/")]) == 2 * len(rv.VARIANTS)
    assert len([m for m in DIGESTS if m.startswith("timm/")]) == 2 * 11


@FORMS
@pytest.mark.parametrize("name", ["A0", "B1g4", "D2se", "plus-L2pse"])
def test_our_leaves_are_the_models(name, deploy):
    model = rv.create_model(name, deploy=deploy)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    ours = leaves(rv.get_variant(name), deploy=deploy, num_classes=1000)
    assert {leaf.path: leaf.shape for leaf in ours} == {
        path: leaf.shape for path, leaf in flatten_dict(shapes).items()
    }


def test_mmpretrain_names():
    """Spelt out for a few keys of each kind; there is no digest of this project's models."""
    entries = naming_for("mmpretrain", rv.get_variant("D2se")).entries(
        rv.get_variant("D2se"), deploy=False, num_classes=1000
    )
    shapes = {entry.key: entry.shape for entry in entries}
    assert shapes["backbone.stem.branch_3x3.conv.weight"] == (64, 3, 3, 3)
    assert shapes["backbone.stem.branch_1x1.norm.running_var"] == (64,)
    assert shapes["backbone.stage_1.7.branch_norm.weight"] == (160,)
    assert shapes["backbone.stage_3.23.branch_norm.num_batches_tracked"] == ()
    assert shapes["backbone.stage_4.0.se_layer.conv1.conv.weight"] == (160, 2560, 1, 1)
    assert shapes["backbone.stage_4.0.se_layer.conv2.conv.bias"] == (2560,)
    assert shapes["head.fc.weight"] == (1000, 2560)


@FORMS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", rv.VARIANTS)
def test_out_and_in_again_is_the_identity(name, family, deploy):
    variant = thin(rv.VARIANTS[name])
    variables = random_variables(variant, deploy=deploy)
    if not has_names(family, variant):
        with pytest.raises(ValueError, match=f"{family} has no names for plus-L2pse"):
            rv.to_state_dict(variables, family=family, variant=variant)
        return
    state = rv.to_state_dict(variables, family=family, variant=variant)
    loaded = rv.load_weights(state, variant=variant)
    assert (loaded.deploy, loaded.num_classes, loaded.family) == (deploy, CLASSES, family)
    assert_identical(loaded.variables, variables)
    again = rv.to_state_dict(loaded.variables, family=family, variant=variant)
    assert_identical(again, state)


@pytest.mark.slow
@FORMS
@pytest.mark.parametrize("name", rv.VARIANTS)
def test_full_size_models_are_recognised_and_identical(name, deploy):
    variables = random_variables(rv.VARIANTS[name], deploy=deploy, num_classes=1000)
    for family in FAMILIES:
        if has_names(family, rv.VARIANTS[name]):
            loaded = rv.load_weights(rv.to_state_dict(variables, family=family))
            found = (loaded.variant, loaded.deploy, loaded.num_classes, loaded.family)
            assert found == (name, deploy, 1000, family)
            assert_identical(loaded.variables, variables)


def test_counts_of_batches_are_dropped_and_written_as_zero():
    variant = rv.Variant("one", (1,), (8,), stem_channels=4)
    state = rv.to_state_dict(random_variables(variant), variant=variant)
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
    with pytest.raises(ValueError, match="official has no names for split"):
        naming_for("official", variant)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="unknown family 'keras'; there are official, timm"):
        naming_for("keras", rv.get_variant("A0"))
