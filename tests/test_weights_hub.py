"""Pretrained weights by name, from a cache that the tests fill."""

import sys

import pytest

import repvgg_jax as rv
from tests.weights_samples import assert_identical, random_variables

COMMIT = "0" * 40


def put_into_cache(cache, name, variables):
    """Lays a file where the hub's client keeps what it downloaded."""
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


def test_the_eleven_names_are_timms():
    assert len(rv.weights.PRETRAINED) == 11
    for name, variant in rv.weights.PRETRAINED.items():
        assert name == f"repvgg_{variant.lower()}.rvgg_in1k"
        assert variant in rv.VARIANTS


@pytest.mark.usefixtures("offline")
def test_a_cached_model_loads_by_any_of_its_names(tmp_path):
    variables = random_variables(rv.VARIANTS["A0"], num_classes=1000)
    put_into_cache(tmp_path, "repvgg_a0.rvgg_in1k", variables)
    for name in ("repvgg_a0.rvgg_in1k", "timm/repvgg_a0.rvgg_in1k", "repvgg_a0"):
        loaded = rv.load_pretrained(name, cache_dir=tmp_path)
        assert (loaded.variant, loaded.deploy, loaded.num_classes) == ("A0", False, 1000)
        assert_identical(loaded.variables, variables)
    backbone = rv.load_pretrained("repvgg_a0", cache_dir=tmp_path, num_classes=0)
    assert "head" not in backbone.variables["params"]


@pytest.mark.usefixtures("offline")
def test_a_file_that_is_another_variant_is_refused(tmp_path):
    variables = random_variables(rv.VARIANTS["A0"], deploy=True)
    put_into_cache(tmp_path, "repvgg_a1.rvgg_in1k", variables)
    with pytest.raises(ValueError, match=r"nearest to A1 .* misshaped"):
        rv.load_pretrained("repvgg_a1", cache_dir=tmp_path)


@pytest.mark.usefixtures("offline")
def test_offline_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="neither in the local cache nor to be had") as caught:
        rv.load_pretrained("repvgg_b1g4.rvgg_in1k", cache_dir=tmp_path)
    assert "timm/repvgg_b1g4.rvgg_in1k/model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"'repvgg_b1g2'; did you mean .*repvgg_b1g4\.rvgg_in1k\?"):
        rv.load_pretrained("repvgg_b1g2")
    with pytest.raises(ValueError, match="no pretrained weights named 'resnet50'; There are"):
        rv.load_pretrained("resnet50")


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'repvgg-jax\[hub\]'"):
        rv.load_pretrained("repvgg_a0")
