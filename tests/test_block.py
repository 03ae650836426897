"""A block's options and refusals; what it computes is tested beside the specs it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repvgg_jax as rv
from repvgg_jax import reparam
from tests.helpers.jit import quick_jit
from tests.helpers.trees import TINY, random_images, random_variables, randomize

pytestmark = pytest.mark.core

X = random_images((2, 6, 6, 8))


def variables_of(module, x=X, **options):
    return randomize(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **options), x))


@pytest.mark.parametrize("form", ["branches", "covariance"])
def test_an_activation_with_parameters_is_in_both_forms(form):
    block = rv.RepVGGBlock(8, activation=nn.PReLU(), train_form=form)
    variables = variables_of(block)
    variables["params"]["activation"]["negative_slope"] = np.float32(0.3)
    deployed = rv.fuse_params(variables, expect=1)
    expected = block.apply(variables, X)
    assert (expected < 0).any()
    fused = block.clone(deploy=True).apply(deployed, X)
    np.testing.assert_allclose(fused, expected, rtol=1e-4, atol=1e-4)
    again = rv.unfuse_params(deployed, like=variables)
    np.testing.assert_allclose(block.apply(again, X), expected, rtol=1e-4, atol=1e-4)

    linear = block.clone(activation=None)
    plain = {**variables, "params": {**variables["params"]}}
    del plain["params"]["activation"]

    def train(block, variables):
        return block.apply(variables, X, True, mutable=["batch_stats"])[0]

    y = train(linear, plain)
    np.testing.assert_allclose(
        train(block, variables), np.where(y > 0, y, 0.3 * y), rtol=1e-4, atol=1e-4
    )


def test_every_block_of_a_model_has_an_activation_of_its_own():
    model = rv.create_model(TINY, num_classes=3, activation=nn.PReLU())
    variables = random_variables(model)
    slopes = [path for path in variables["params"] if "activation" in variables["params"][path]]
    assert len(slopes) == 4
    fused = model.fuse(variables)
    images = random_images((1, 32, 32, 3))
    np.testing.assert_allclose(
        model.clone(deploy=True).apply(fused, images), model.apply(variables, images), atol=1e-3
    )


@pytest.mark.parametrize("form", ["branches", "covariance"])
def test_frozen_statistics_stay_and_are_used_in_training(form):
    block = rv.RepVGGBlock(8, freeze_statistics=True, train_form=form)
    variables = variables_of(block)
    y, new = block.apply(variables, X, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, block.apply(variables, X))
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])
    gradients = jax.grad(lambda p: block.apply({**variables, "params": p}, X, True).sum())(
        variables["params"]
    )
    assert np.abs(gradients["bn3x3"]["scale"]).max() > 0


def test_whether_it_trains_may_be_an_attribute():
    inside = nn.Sequential([rv.RepVGGBlock(8, train=True), rv.RepVGGBlock(8, stride=2)])
    variables = variables_of(inside)
    y, new = inside.apply(variables, X, mutable=["batch_stats"])
    first = {name: tree["layers_0"] for name, tree in variables.items()}
    y0, new0 = rv.RepVGGBlock(8).apply(first, X, True, mutable=["batch_stats"])
    second = {name: tree["layers_1"] for name, tree in variables.items()}
    np.testing.assert_allclose(y, rv.RepVGGBlock(8, stride=2).apply(second, y0), atol=1e-5)
    before, after = variables["batch_stats"], new["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, after["layers_0"], new0["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, after["layers_1"], before["layers_1"])
    with pytest.raises(ValueError, match="train"):
        rv.RepVGGBlock(8, train=True).apply(first, X, False)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("shape", [(6, 6, 8), (1, 2, 6, 6, 8)])
def test_other_ranks_are_refused_in_both_forms(deploy, shape):
    block = rv.RepVGGBlock(8, deploy=deploy)
    with pytest.raises(ValueError, match=r"shape \(.*6, 6, 8\); expected 4 axes"):
        jax.eval_shape(block.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_tables_name_blocks_and_count_operations():
    model = rv.create_model(TINY, num_classes=3)
    images = jnp.zeros((1, 16, 16, 3))
    table = model.tabulate(
        jax.random.key(0), images, compute_flops=True, console_kwargs={"width": 240}
    )
    for name in ("stem", "stage1_block0", "stage2_block1/conv3x3", "RepVGGBlock"):
        assert name in table
    for helper in ("_evaluate", "_activate", "_fast_train", "_auxiliary"):
        assert helper not in table


def test_integers_of_numpy_are_integers():
    plain = rv.Variant("v", (1, 2), (8, 16), stem_channels=8, groups=2)
    numpy = rv.Variant("v", tuple(np.int64([1, 2])), np.array([8, 16]), np.int32(8), np.uint8(2))
    assert numpy == plain
    assert hash(numpy) == hash(plain)
    block = rv.RepVGGBlock(np.int64(8), stride=np.int32(2), groups=np.int8(2))
    assert block == rv.RepVGGBlock(8, stride=2, groups=2)
    conv = reparam.Conv("conv", (np.int64(3), np.int64(1)))
    spec = reparam.BlockSpec("mine", reparam.Chain((conv, reparam.Norm("bn"))))
    assert variables_of(rv.ReparamBlock(8, spec=spec))["params"]["conv"]["kernel"].shape[:2] == (
        3,
        1,
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
@pytest.mark.parametrize("option", ["features", "stride", "dilation", "groups", "bn_group_size"])
def test_numbers_that_cannot_be_are_refused_at_construction(option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r} must be a positive integer"):
        rv.RepVGGBlock(**{"features": 8, option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train_form", "covarience"),
        ("lowering", "fast"),
        ("activation", "relu"),
        ("momentum", 1.5),
        ("epsilon", -1e-5),
        ("epsilon", float("nan")),
        ("se", 4),
        ("spec", "REPVGG"),
    ],
)
def test_options_that_cannot_be_are_refused_at_construction(option, value):
    """A misspelled train form would otherwise train another one in silence."""
    with pytest.raises(ValueError, match=f"{option}={value!r} must be"):
        rv.RepVGGBlock(8, **{option: value})
    if option not in ("se", "spec"):
        with pytest.raises(ValueError, match=f"{option}={value!r} must be"):
            rv.create_model("A0", **{option: value})


@pytest.mark.parametrize("deploy", [False, True])
def test_feature_maps_of_nothing(deploy):
    block = rv.RepVGGBlock(8, deploy=deploy)
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 0\) have no channels"):
        jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 8, 8, 0)))
    if not deploy:
        empty = jnp.zeros((2, 0, 8, 8))
        with pytest.raises(ValueError, match="more than one value per channel"):
            jax.eval_shape(lambda: block.init(jax.random.key(0), empty, train=True))


@pytest.mark.parametrize("value", [0, -1, 0.5])
def test_variants_and_gates_refuse_them_too(value):
    with pytest.raises(ValueError, match=f"reduction={value!r} must be a positive integer"):
        rv.SqueezeExcite(value)
    with pytest.raises(ValueError, match=f"groups={value!r} must be a positive integer"):
        rv.Variant("v", (1,), (8,), 8, groups=value)
    with pytest.raises(ValueError, match=f"groups={value!r} must be a positive integer"):
        rv.Variant("v", (1,), (8,), 8, groups=(value,))


def test_a_name_in_place_of_a_variant():
    with pytest.raises(ValueError, match=r"create_model\('A0'\)"):
        rv.RepVGG("A0")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_running_statistics_are_float32_beside_narrow_parameters(dtype):
    model = rv.create_model(TINY, num_classes=3, dtype=dtype, param_dtype=dtype)
    images = jnp.zeros((4, 16, 16, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["batch_stats"])} == {
        jnp.dtype("float32")
    }
    for form in ("branches", "covariance"):
        trained = model.clone(train_form=form)

        def train(variables, trained=trained):
            return trained.apply(variables, images, train=True, mutable=["batch_stats"])

        _, new = jax.eval_shape(train, variables)
        assert new["batch_stats"] == variables["batch_stats"]


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_fold_that_overflows_float16_says_so(xp):
    variables = variables_of(rv.RepVGGBlock(8, param_dtype=jnp.float16))
    variables = jax.tree.map(xp.asarray, variables)
    fused = rv.fuse_params(variables)["params"]["reparam"]["kernel"]
    assert fused.dtype == np.float16
    stats = variables["batch_stats"]["bn1x1"]
    stats["var"] = xp.full_like(stats["var"], 1e-12)
    variables["params"]["bn1x1"]["scale"] = xp.full(8, 3e3, xp.float16)
    with pytest.raises(ValueError, match=r"reparam/kernel: .*float16.*65504"):
        rv.fuse_params(variables)
    wide = jax.tree.map(lambda leaf: leaf.astype(xp.float32), variables)
    assert np.isfinite(rv.fuse_params(wide)["params"]["reparam"]["kernel"]).all()


def test_one_row_is_no_layout():
    model = rv.create_model(TINY, num_classes=3)
    spectrogram = np.zeros((2, 1, 64, 64), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), spectrogram)
    assert jax.eval_shape(model.apply, variables, spectrogram).shape == (2, 3)


@pytest.mark.parametrize("deploy", [False, True])
def test_parameters_tell_the_layout_of_oblong_images(deploy):
    model = rv.create_model(TINY, num_classes=3, deploy=deploy)
    variables = random_variables(model)
    with pytest.raises(ValueError, match="48 channels, but these parameters take 3"):
        jax.eval_shape(model.apply, variables, np.zeros((2, 3, 32, 48), np.float32))
    with pytest.raises(ValueError, match="look channels-first"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 3, 32, 32), np.float32))


def test_gradients_through_a_jitted_fold(rng):
    """Nothing reads values inside a trace, whether leaves are arguments or constants."""
    variables = variables_of(rv.RepVGGBlock(8))
    variables = jax.tree.map(jnp.asarray, variables)
    deploy = rv.RepVGGBlock(8, deploy=True)
    expected = deploy.apply(rv.fuse_params(variables), X)
    found = quick_jit(lambda x: deploy.apply(rv.fuse_params(variables), x))(X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
