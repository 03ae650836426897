import dataclasses
import hashlib
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import VARIANTS, RepVGGBlock, Variant, cost, create_model, fuse_params
from repvgg_jax.model import keep_convolutions
from tests.helpers.jit import quick_jit
from tests.helpers.trees import TINY, TINY_AUXILIARY, paths, random_images, random_variables

pytestmark = pytest.mark.core

# Two trees name by name, to read; all the official ones as SHA-256 of the same lines.
PINNED = json.loads(pathlib.Path(__file__).with_name("tree_names.json").read_text())
NAMES, DIGESTS = PINNED["names"], PINNED["sha256"]


def shapes_of(module, shape):
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def shapes(model, size=64):
    return shapes_of(model, (1, size, size, 3))


def lines(tree) -> list[str]:
    """Every leaf's name and shape."""
    leaves = jax.tree.leaves(tree)
    return [f"{p} {list(leaf.shape)}" for p, leaf in zip(paths(tree), leaves, strict=True)]


ALL = [n if n in ("A0", "B1g4") else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]


@pytest.mark.parametrize("name", ALL)
def test_real_trees_have_the_parameters_that_cost_counts_and_names_that_never_change(name):
    counted = cost(name)
    for deploy, expected in (
        (False, counted.params_train + counted.params_auxiliary),
        (True, counted.params_deploy),
    ):
        tree = shapes(create_model(name, deploy=deploy, lowering="plain"))
        assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == expected
        assert ("batch_stats" in tree) is not deploy
        digest = hashlib.sha256("\n".join(lines(tree)).encode()).hexdigest()
        assert digest == DIGESTS[f"{name} {'deploy' if deploy else 'train'}"]


@pytest.mark.parametrize("variant", [VARIANTS["A0"], TINY_AUXILIARY], ids=lambda v: v.name)
@pytest.mark.parametrize("deploy", [False, True])
def test_tree_names_never_change(variant, deploy):
    """Checkpoints stay readable only as long as every name and shape stays as it is.

    If a name must change, write how to read the old one, then update tests/tree_names.json.
    """
    found = lines(shapes(create_model(variant, deploy=deploy)))
    assert found == NAMES[f"{variant.name} {'deploy' if deploy else 'train'}"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_in_channels_follow_the_images(channels):
    model = create_model(TINY, num_classes=5)
    variables = random_variables(model, channels=channels)
    images = random_images((2, 32, 32, channels))
    assert quick_jit(model.apply)(variables, images).shape == (2, 5)


def test_variables_of_other_classes_are_told_with_both_numbers():
    for head in ("linear", "distilled"):
        variant = dataclasses.replace(TINY, head=head)
        model = create_model(variant, num_classes=5)
        variables = random_variables(model)
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
        for form, given in ((model, variables), (model.clone(deploy=True), model.fuse(variables))):
            other = form.clone(num_classes=7)
            with pytest.raises(ValueError, match=r"num_classes=7.* 5 classes"):
                jax.eval_shape(other.apply, given, images)
            features = jax.eval_shape(form.clone(num_classes=0).apply, given, images)
            assert features.shape == (2, TINY.channels[-1])


def test_no_classes_gives_pooled_features():
    model = create_model(TINY, num_classes=0)
    variables = random_variables(model)
    images = random_images((2, 32, 32, 3))
    maps = model.apply(variables, images, method="features")
    pooled = model.apply(variables, images)
    assert "head" not in variables["params"]
    np.testing.assert_allclose(pooled, maps["stage2"].mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(("stride", "sizes"), [(32, (7, 4)), (16, (7, 7)), (8, (14, 14))])
@pytest.mark.parametrize("deploy", [False, True])
def test_feature_maps_at_every_output_stride_in_both_forms(stride, sizes, deploy):
    model = create_model("A0", output_stride=stride, deploy=deploy, lowering="plain")
    variables = shapes(model)
    images = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, images)
    assert maps.keys() == {"stem", "stage1", "stage2", "stage3", "stage4"}
    assert maps["stage2"].shape == (2, 14, 14, 96)
    assert maps["stage3"].shape == (2, sizes[0], sizes[0], 192)
    assert maps["stage4"].shape == (2, sizes[1], sizes[1], 1280)
    chex.assert_trees_all_equal_shapes(
        variables, shapes(create_model("A0", deploy=deploy, lowering="plain"))
    )


def test_bfloat16_computes_in_bfloat16_and_keeps_everything_else_in_float32():
    model = create_model(TINY, num_classes=5, dtype=jnp.bfloat16)
    images = random_images((2, 32, 32, 3))
    abstract = shapes(model, 32)

    def both(variables, images):
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updated, model.apply(variables, images, method="features")

    logits, updated, maps = jax.eval_shape(both, abstract, images)
    assert {leaf.dtype for leaf in jax.tree.leaves((abstract, updated, logits))} == {
        jnp.dtype("float32")
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(maps)} == {jnp.dtype("bfloat16")}
    variables = quick_jit(model.init)(jax.random.key(0), images)
    exact = create_model(TINY, num_classes=5).apply(variables, images)
    found = quick_jit(model.apply)(variables, images)
    np.testing.assert_allclose(found, exact, atol=0.05)


@pytest.mark.slow
def test_remat_changes_memory_not_values():
    """In float64, where two programs for the same function differ by nearly nothing."""
    images = random_images((4, 16, 16, 3), dtype=np.float64)
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    models = [
        create_model(TINY, num_classes=5, remat=remat, **wide)
        for remat in (False, True, keep_convolutions, jax.checkpoint_policies.nothing_saveable)
    ]

    def loss(model, params):
        logits, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits).sum(), updated

    with jax.enable_x64(True):
        variables = random_variables(models[0])
        results = [
            quick_jit(jax.value_and_grad(lambda p, m=model: loss(m, p), has_aux=True))(
                variables["params"]
            )
            for model in models
        ]
    for other in results[1:]:
        chex.assert_trees_all_close(results[0], other, rtol=1e-10, atol=1e-10)


def test_remat_policies_choose_what_is_recomputed():
    """Convolutions in the program of a gradient: forward, recomputed, backward."""
    images = random_images((2, 16, 16, 3))

    def convolutions(remat, lowering="plain"):
        model = create_model(TINY, num_classes=5, remat=remat, lowering=lowering)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(params, stats):
            tree = {"params": params, "batch_stats": stats}
            return model.apply(tree, images, train=True, mutable=["batch_stats"])[0].sum()

        program = jax.make_jaxpr(jax.grad(loss))(variables["params"], variables["batch_stats"])
        # On CPUs those of 1x1 are matrix products.
        counted = "conv_general_dilated[" if lowering == "plain" else "dot_general["
        return str(program).count(counted)

    forward = 2 * len(TINY.layers())
    none, everything = convolutions(False), convolutions(True)
    assert everything == none + forward
    assert convolutions(keep_convolutions) == none
    none, everything = convolutions(False, "auto"), convolutions(True, "auto")
    assert everything > none
    assert convolutions(keep_convolutions, "auto") == none


def test_evaluation_is_the_default_and_leaves_statistics_alone():
    model = create_model(TINY, num_classes=5)
    variables = random_variables(model)
    images = random_images((2, 32, 32, 3))
    logits, after = model.apply(variables, images, mutable=["batch_stats"])
    chex.assert_trees_all_equal(after["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(logits, model.apply(variables, images, train=False))


def test_training_moves_every_statistic():
    model = create_model(TINY, num_classes=5)
    variables = random_variables(model)
    images = random_images((4, 32, 32, 3))
    _, after = quick_jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    before, moved = jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(after)
    assert len(before) == len(moved)
    assert all((a != b).all() for a, b in zip(before, moved, strict=True))


def test_auxiliary_heads_speak_in_training_when_asked_and_are_gone_in_deploy():
    model = create_model(TINY_AUXILIARY, num_classes=5)
    variables = random_variables(model)
    images = random_images((4, 32, 32, 3))

    def train(*collections):
        return quick_jit(lambda v, x: model.apply(v, x, train=True, mutable=list(collections)))

    logits, updated = train("batch_stats", "auxiliary")(variables, images)
    assert logits.shape == (4, 5)
    assert {name: aux.shape for name, aux in updated["auxiliary"].items()} == {
        "aux_stage1_block1": (4, 5),
        "aux_stage2_block0": (4, 5),
    }
    plain, updated = train("batch_stats")(variables, images)
    assert updated.keys() == {"batch_stats"}
    np.testing.assert_allclose(plain, logits, atol=1e-5 * np.abs(logits).max())
    assert not [p for p in paths(fuse_params(variables)) if "aux" in p]
    assert not [p for p in paths(shapes(model.clone(deploy=True))) if "aux" in p]


def test_a_block_alone_decides_its_identity_by_shape():
    for features, stride, identity in ((8, 1, True), (8, 2, False), (16, 1, False)):
        tree = shapes_of(RepVGGBlock(features, stride=stride), (1, 4, 4, 8))
        assert ("bn_identity" in tree["params"]) is identity


def test_initial_weights_are_pytorchs():
    model = create_model(Variant("wide", (1,), (1280,), 16))
    tree = quick_jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = np.asarray(tree["stage1_block0"]["conv3x3"]["kernel"])
    bound = 1 / np.sqrt(9 * 16)
    assert np.abs(kernel).max() <= bound
    assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    head = tree["head"]
    assert np.abs(head["bias"]).max() <= 1 / np.sqrt(1280)
    assert np.asarray(head["bias"]).std() == pytest.approx(1 / np.sqrt(3 * 1280), rel=0.1)


class TestBadInput:
    images = random_images((2, 32, 32, 3))

    @pytest.fixture
    def variables(self):
        return random_variables(create_model(TINY, num_classes=5))

    def test_rank(self, variables):
        with pytest.raises(ValueError, match=r"shape \(32, 32, 3\); expected 4 axes"):
            create_model(TINY, num_classes=5).apply(variables, self.images[0])

    def test_channels_first_on_init(self):
        with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) look channels-first.*transpose"):
            create_model(TINY).init(jax.random.key(0), self.images.transpose(0, 3, 1, 2))

    def test_channels_first_on_apply(self, variables):
        with pytest.raises(ValueError, match="32 channels, but these parameters take 3"):
            create_model(TINY, num_classes=5).apply(variables, self.images.transpose(0, 3, 1, 2))

    def test_raw_pixels(self, variables):
        with pytest.raises(ValueError, match="images are uint8; expected normalized"):
            create_model(TINY, num_classes=5).apply(variables, self.images.astype(np.uint8))

    def test_training_variables_for_a_deploy_model(self, variables):
        with pytest.raises(ValueError, match=r"stem: .*deploy form.*through fuse_params"):
            create_model(TINY, num_classes=5, deploy=True).apply(variables, self.images)

    def test_deploy_variables_for_a_training_model(self, variables):
        with pytest.raises(ValueError, match=r"stem: .*training form.*deploy=True"):
            create_model(TINY, num_classes=5).apply(fuse_params(variables), self.images)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("num_classes", -1),
            ("num_classes", 1.5),
            ("num_classes", True),
            ("bn_group_size", 0),
            ("remat", "convolutions"),
        ],
    )
    def test_numbers_that_cannot_be(self, option, value):
        with pytest.raises(ValueError, match=f"{option}={value!r}"):
            create_model(TINY, **{option: value})

    def test_squeezing_to_nothing(self):
        variant = Variant("thin", (1,), (8,), 8, se={"reduction": 16})
        with pytest.raises(ValueError, match="reduction 16 leaves nothing of 8 channels"):
            shapes(create_model(variant))

    def test_an_identity_that_cannot_be(self):
        with pytest.raises(ValueError, match=r"equal channels and stride 1, got 3 -> 8"):
            RepVGGBlock(8, identity=True).init(jax.random.key(0), self.images)
