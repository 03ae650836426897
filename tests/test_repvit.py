"""RepViT: residual connections, two heads, and parity with timm's models in both forms."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import repvgg_jax as rv
from repvgg_jax.train.classes import fit_head
from repvgg_jax.weights.tree import head_width
from tests.helpers.jit import quick_jit
from tests.helpers.pth_writer import write_zip
from tests.helpers.trees import random_images, random_variables
from tests.helpers.weights_samples import random_weights

TINY = dataclasses.replace(
    rv.get_variant("repvit_m0_9"),
    depths=(2, 3),
    channels=(16, 24),
    stem_channels=16,
    strides=(1, 2),
)
ONE_HEAD = dataclasses.replace(TINY, head="norm")


@pytest.mark.parametrize(
    "variant", [pytest.param(TINY, marks=pytest.mark.core), ONE_HEAD], ids=lambda v: v.head
)
def test_fused_in_float64(variant):
    with jax.enable_x64(True):
        model = rv.create_model(variant, num_classes=5, dtype="float64", param_dtype="float64")
        variables = random_variables(model)
        images = random_images((2, 37, 50, 3), dtype=np.float64)
        expected = quick_jit(model.apply)(variables, images)
        fused = model.fuse(variables)
        found = quick_jit(model.clone(deploy=True).apply)(fused, images)
    assert list(fused) == ["params"]
    assert list(fused["params"]["head"]) == ["reparam"]
    np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())


def test_a_residual_connection_adds_the_input_of_the_layers_it_spans():
    """Projections that give zero leave the mixers; the first one's are those of the stem."""
    model = rv.create_model(dataclasses.replace(TINY, depths=(1, 1)), num_classes=0)
    variables = random_variables(model)
    params = dict(variables["params"])
    ends = [layer.name for layer in model.layers if layer.residual]
    assert ends == [
        f"stage{stage}_block{index}" for stage, index in [(1, 2), (2, 2), (2, 6), (2, 9)]
    ]
    for name in ends:
        zero = jax.tree.map(np.zeros_like, params[name]["bn_single"])
        params[name] = {**params[name], "bn_single": zero}
    images = random_images((1, 32, 32, 3))
    changed = {**variables, "params": params}

    def mixed(model, images):
        return model.stage1_block0(model.stem_block1(model.stem(images)))

    maps = quick_jit(functools.partial(model.apply, method="features"))(changed, images)
    expected = quick_jit(functools.partial(model.apply, method=mixed))(changed, images)
    np.testing.assert_allclose(maps["stage1"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", [TINY], ids=lambda v: v.head)
def test_a_deploy_file_of_other_classes_keeps_the_backbone(variant):
    model = rv.create_model(variant, num_classes=5)
    trained = random_variables(model)
    state = rv.to_state_dict(model.fuse(trained), family="timm", variant=variant)
    assert {key for key in state if key.startswith("head.")} == {"head.weight", "head.bias"}
    loaded = rv.load_weights(state, variant=variant)
    assert (loaded.family, loaded.num_classes) == ("timm", 5)
    images = random_images((2, 32, 32, 3))
    for classes in (5, 7):
        fresh = rv.create_model(variant, num_classes=classes)
        start = random_variables(fresh, seed=1)
        merged = rv.merge_weights(loaded, start, variant=variant)
        assert bool(merged.replaced) == (classes != 5)
        if classes == 5:
            expected = quick_jit(model.apply)(trained, images)
            found = quick_jit(fresh.apply)(merged.variables, images)
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        else:
            chex.assert_trees_all_equal(merged.variables["params"]["head"], start["params"]["head"])
            chex.assert_trees_all_equal(
                merged.variables["batch_stats"]["head"], start["batch_stats"]["head"]
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in rv.FAMILY if n.startswith("repvit") and n != "repvit_m0_6"]
)
def test_parameters_are_those_of_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    with torch.device("meta"):
        theirs = timm.create_model(name).eval()
    found = rv.cost(name)
    assert found.params_train == sum(p.numel() for p in theirs.parameters())
    theirs.fuse()
    assert found.params_deploy == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("variant", [TINY, ONE_HEAD], ids=lambda v: v.head)
def test_parity_with_timm(variant):
    pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    from timm.models.repvit import RepVit

    theirs = RepVit(
        embed_dim=variant.channels,
        depth=variant.depths,
        num_classes=5,
        distillation=variant.head == "distilled",
    ).eval()
    rng = torch.Generator().manual_seed(0)
    state = {
        key: torch.rand(value.shape, generator=rng) * 0.5 + 0.2
        if value.is_floating_point() and ("bn" in key)
        else torch.randn(value.shape, generator=rng) * 0.2
        if value.is_floating_point()
        else value
        for key, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    loaded = rv.load_weights(state, variant=variant)
    assert (loaded.family, loaded.deploy, loaded.num_classes) == ("timm", False, 5)
    model = rv.create_model(variant, num_classes=5)
    images = random_images((2, 64, 48, 3))
    expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).detach().numpy()
    scale = np.abs(expected).max()
    with jax.default_matmul_precision("highest"):
        found = quick_jit(model.apply)(loaded.variables, images)
        np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
        # Their own fold, read in deploy form, and ours as they name it.
        theirs.fuse()
        again = rv.load_weights(theirs.state_dict(), variant=variant)
        assert again.deploy
        fused = model.fuse(loaded.variables)
        chex.assert_trees_all_close(again.variables, fused, atol=1e-5)
        written = rv.to_state_dict(fused, family="timm", variant=variant)
        assert {k: v.shape for k, v in written.items()} == {
            k: tuple(v.shape) for k, v in theirs.state_dict().items()
        }
        found = quick_jit(model.clone(deploy=True).apply)(again.variables, images)
        np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


def test_training_moves_the_statistics_of_the_heads():
    model = rv.create_model(dataclasses.replace(TINY, depths=(1, 1)), num_classes=5)
    variables = random_variables(model)
    images = random_images((4, 32, 32, 3))
    logits, new = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    assert logits.shape == (4, 5)
    before, after = (tree["batch_stats"]["head"] for tree in (variables, new))
    for norm in ("bn_head", "bn_head_dist"):
        assert np.abs(np.asarray(after[norm]["mean"]) - before[norm]["mean"]).max() > 0


@pytest.mark.parametrize(
    "deploy", [False, pytest.param(True, marks=pytest.mark.core)], ids=["training", "deploy"]
)
def test_the_classes_of_both_heads_are_reordered_by_name(deploy):
    variables = random_weights(TINY, deploy=deploy, num_classes=3)
    state = rv.to_state_dict(variables, family="flax", variant=TINY)
    weights = rv.load_weights(state, variant=TINY)
    moved, _ = fit_head(weights, ("cat", "dog", "emu"), ("emu", "cat", "dog"))
    head, after = (v["params"]["head"] for v in (variables, moved.variables))
    for name in ("reparam",) if deploy else ("head", "head_dist"):
        for leaf in ("kernel", "bias"):
            np.testing.assert_array_equal(after[name][leaf], head[name][leaf][..., [2, 0, 1]])
    if not deploy:
        chex.assert_trees_all_equal(after["bn_head"], head["bn_head"])
    assert head_width(flatten_dict(variables)) == 3


@pytest.mark.core
@pytest.mark.parametrize(
    ("family", "mixer"), [("timm", "token_mixer"), ("official", "token_mixer.0")]
)
def test_the_mixer_of_the_first_version_is_refused(family, mixer):
    """Those of m1 to m3 have a norm behind the 1x1 convolution, and none behind the sum."""
    state = rv.to_state_dict(
        random_variables(rv.create_model(TINY, num_classes=5)), family=family, variant=TINY
    )
    old = {
        key.replace("conv1.weight", "conv1.c.weight") if mixer in key else key: value
        for key, value in state.items()
    }
    with pytest.raises(ValueError, match=rf"unexpected .*{mixer}\.conv1\.c\.weight"):
        rv.load_weights(old, variant=TINY)


@pytest.mark.parametrize(
    "deploy", [False, pytest.param(True, marks=pytest.mark.core)], ids=["training", "deploy"]
)
@pytest.mark.parametrize("variant", [TINY, ONE_HEAD], ids=lambda v: v.head)
class TestFilesOfTheAuthors:
    def test_they_give_the_same_outputs(self, variant, deploy, tmp_path):
        """Written by their names, as their training saves it, and read again."""
        model = rv.create_model(variant, num_classes=5, deploy=deploy)
        variables = random_variables(model)
        state = rv.to_state_dict(variables, family="official", variant=variant)
        heads = {key.rpartition(".")[0] for key in state if key.startswith("classifier.")}
        own = {f"classifier.classifier.{child}" for child in ("bn", "l")}
        teacher = {key.replace(".classifier.", ".classifier_dist.") for key in own}
        both = own | teacher if variant is TINY else own
        assert heads == ({"classifier"} if deploy else both)
        assert len(state) - sum("num_batches" in key for key in state) == len(
            flatten_dict(variables)
        )
        file = tmp_path / "repvit_distill_300e.pth"
        write_zip(file, state, wrapper="model")
        loaded = rv.load_weights(file, variant=variant)
        assert (loaded.family, loaded.deploy, loaded.num_classes) == ("official", deploy, 5)
        chex.assert_trees_all_equal(loaded.variables, variables)
        fused = [v if deploy else model.fuse(v) for v in (loaded.variables, variables)]
        apply = quick_jit(model.clone(deploy=True).apply)
        images = random_images((2, 37, 50, 3))
        found, expected = (apply(v, images) for v in fused)
        np.testing.assert_array_equal(found, expected)

    def test_a_detectors_backbone(self, variant, deploy):
        weights = random_weights(variant, deploy=deploy)
        state = rv.to_state_dict(weights, family="official", variant=variant)
        backbone = {
            f"backbone.{key}": value
            for key, value in state.items()
            if not key.startswith("classifier.")
        }
        others = {"neck.lateral.0.weight": np.zeros((8, 24, 1, 1), np.float32)}
        loaded = rv.load_weights({**backbone, **others}, variant=variant, num_classes=0)
        assert (loaded.family, loaded.deploy) == ("official", deploy)
        assert loaded.unused == tuple(others)
        del backbone["backbone.features.3.channel_mixer.m.2." + ("bias" if deploy else "bn.bias")]
        with pytest.raises(ValueError, match=r"1 missing \[features\.3\.channel_mixer\.m\.2\."):
            rv.load_weights({**backbone, **others}, variant=variant, num_classes=0)


@pytest.mark.core
@pytest.mark.parametrize(("field", "value"), [("head", "pair"), ("activation", "gel")])
def test_fields_of_a_variant_that_no_network_has(field, value):
    with pytest.raises(ValueError, match=f"{field}='{value}' must be one of"):
        dataclasses.replace(TINY, **{field: value})
