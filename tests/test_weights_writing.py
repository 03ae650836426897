"""Files that we write, and weights to start fine-tuning from."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import repvgg_jax as rv
from tests.weights_samples import CLASSES, TINY, assert_identical, random_variables


@pytest.fixture
def variables():
    return random_variables(TINY)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("family", rv.weights.FAMILIES)
def test_written_and_read_again(suffix, family, tmp_path, variables):
    path = tmp_path / f"weights{suffix}"
    rv.save_weights(path, jax.tree.map(jnp.asarray, variables), family=family, variant=TINY)
    loaded = rv.load_weights(path, variant=TINY)
    assert loaded.family == family
    assert_identical(loaded.variables, variables)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_safetensors_carry_the_mark_that_pytorch_projects_ask_for(tmp_path, variables):
    path = tmp_path / "model.safetensors"
    rv.save_weights(path, variables, family="timm", variant=TINY)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_older_file_is_replaced_whole_or_not_at_all(tmp_path, variables, monkeypatch):
    path = tmp_path / "weights.npz"
    rv.save_weights(path, variables, variant=TINY)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(ValueError, match=r"weights\.npz: cannot be written: No space left"):
        rv.save_weights(path, variables, variant=TINY)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_places_that_cannot_be_written(suffix, tmp_path, variables):
    path = tmp_path / "absent" / f"weights{suffix}"
    with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
        rv.save_weights(path, variables, variant=TINY)
    path = tmp_path / f"directory{suffix}"
    path.mkdir()
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        rv.save_weights(path, variables, variant=TINY)
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_suffixes_are_listed(tmp_path, variables):
    with pytest.raises(ValueError, match=r"must be one of \.safetensors, \.npz, \.pth, \.pt"):
        rv.save_weights(tmp_path / "weights.h5", variables, variant=TINY)


def test_pth_without_pytorch_says_what_to_do(tmp_path, variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install 'repvgg-jax\[torch\]'"):
        rv.save_weights(tmp_path / "weights.pth", variables, variant=TINY)
    assert not list(tmp_path.iterdir())


def test_incomplete_variables_are_not_written(variables):
    del variables["batch_stats"]["stem"]
    with pytest.raises(ValueError, match=r"missing \[batch_stats/stem/bn3x3/mean"):
        rv.to_state_dict(variables, variant=TINY)
    with pytest.raises(ValueError, match="variables: stem is a str, no array"):
        rv.to_state_dict({"stem": "?"})
    with pytest.raises(ValueError, match="not a list"):
        rv.to_state_dict([])


def test_precisions_that_checkpoints_do_not_take(variables):
    cast = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), variables)
    with pytest.raises(ValueError, match=r"kernel is bfloat16; checkpoints take .*astype"):
        rv.to_state_dict(cast, variant=TINY)


# Where fine-tuning starts.

FEATURES = jax.jit(rv.create_model(TINY, num_classes=0).apply)


def fresh(variant=TINY, num_classes=CLASSES, deploy=False):
    """As from `model.init`, which would take long to compile."""
    variables = random_variables(variant, deploy=deploy, num_classes=num_classes, seed=1)
    return jax.tree.map(jnp.asarray, variables)


def load(variables, **options):
    return rv.load_weights(rv.to_state_dict(variables, variant=TINY), variant=TINY, **options)


def test_everything_is_taken_where_everything_fits(variables):
    merged = rv.merge_weights(load(variables), fresh())
    assert_identical(merged.variables, variables)
    assert merged.replaced == ()
    assert str(merged) == (
        "starting from tiny, training form, 5 classes, official names; nothing is fresh"
    )


@pytest.mark.parametrize("backbone_only", [False, True])
def test_the_head_stays_fresh_where_the_classes_differ(backbone_only, variables):
    target = fresh(num_classes=3)
    loaded = load(variables, num_classes=0 if backbone_only else None)
    merged = rv.merge_weights(loaded, target)
    assert merged.replaced == ("head",)
    assert str(merged).endswith("; freshly initialised: head")
    head = merged.variables["params"].pop("head")
    assert_identical(jax.tree.map(np.asarray, head), jax.device_get(target["params"]["head"]))
    del variables["params"]["head"]
    assert_identical(merged.variables, variables)


def test_a_model_without_a_head_takes_the_backbone(variables):
    merged = rv.merge_weights(load(variables), fresh(num_classes=0))
    del variables["params"]["head"]
    assert_identical(merged.variables, variables)


@pytest.mark.parametrize("num_classes", [CLASSES, 3, 0])
def test_a_deploy_form_is_split_into_branches_that_compute_the_same(num_classes, variables, rng):
    deployed = rv.fuse_params(variables)
    merged = rv.merge_weights(load(deployed), fresh(num_classes=num_classes))
    assert merged.unfused
    assert "; deploy form split into three branches; " in str(merged)
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    backbone = {
        **variables,
        "params": {k: v for k, v in variables["params"].items() if k != "head"},
    }
    merged.variables["params"].pop("head", None)
    expected, found = FEATURES(backbone, images), FEATURES(merged.variables, images)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_auxiliary_heads():
    variant = rv.Variant("aux", (1, 1), (8, 8), stem_channels=8, auxiliary=("stage1_block0",))
    source = random_variables(variant)

    def loaded(variables):
        return rv.load_weights(rv.to_state_dict(variables, variant=variant), variant=variant)

    merged = rv.merge_weights(loaded(source), fresh(variant, 3))
    assert merged.replaced == ("aux_stage1_block0/logits", "head")
    aux = merged.variables["params"]["aux_stage1_block0"]
    assert_identical(aux["conv"], source["params"]["aux_stage1_block0"]["conv"])
    # The deploy form has none; the fresh ones, statistics included, take their place.
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


def test_another_network_lists_what_differs(variables):
    other = rv.Variant("wider", (1, 2), (8, 16), stem_channels=4, se=rv.SqueezeExcite(4))
    with pytest.raises(ValueError, match=r"does not fit the model .* misshaped \[.*stage2"):
        rv.merge_weights(load(variables), fresh(other))
    with pytest.raises(ValueError, match="build the model with deploy=False"):
        rv.merge_weights(load(variables), fresh(deploy=True))
