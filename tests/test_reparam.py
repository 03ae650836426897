"""Blocks as expressions: each spec against the impulse response of the module that trains it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import ReparamBlock, RepVGGBlock, fuse_linear, fuse_model, fuse_params, reparam
from repvgg_jax.reparam import ACB, DBB, QAREPVGG, REPVGG, large_kernel, mobileone
from tests.helpers.jit import quick_jit
from tests.trees import random_images, randomise

pytestmark = pytest.mark.core

MINE = reparam.BlockSpec(
    "pre-norm",
    reparam.Sum(
        (
            reparam.Chain((reparam.Norm("pre"), reparam.Conv("conv", (3, 5), bias=True))),
            reparam.Chain((reparam.Conv("dilated", (3, 3), dilation=2), reparam.Scale("gain"))),
            reparam.SameShape(reparam.Scale(factor=-1.0)),
        )
    ),
)
SPECS = {
    "RepVGG": (REPVGG, {}),
    "RepVGG, stride and groups": (REPVGG, {"stride": 2, "groups": 2}),
    "RepVGG, dilation": (REPVGG, {"dilation": 2}),
    "ACB": (ACB, {}),
    "ACB, groups": (ACB, {"stride": 2, "groups": 2}),
    "DBB": (DBB, {}),
    "DBB, stride and groups": (DBB, {"stride": 2, "groups": 2}),
    "MobileOne depthwise": (mobileone(3, branches=3), {"groups": 4}),
    "MobileOne depthwise, stride": (mobileone(3, branches=2), {"groups": 4, "stride": 2}),
    "MobileOne pointwise": (mobileone(1, branches=2), {}),
    "QARepVGG": (QAREPVGG, {}),
    "QARepVGG, stride and groups": (QAREPVGG, {"stride": 2, "groups": 2}),
    "large kernel": (large_kernel(31, 5), {"groups": 4}),
    "pre-norm, dilated, subtracted": (MINE, {}),
}


def block_and_variables(spec, options, *, activation=None, features=4):
    """A block in float64 with random parameters and statistics."""
    block = ReparamBlock(
        features,
        spec=spec,
        activation=activation,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        lowering="plain",
        **options,
    )
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float64)
        return block, randomise(jax.eval_shape(block.init, jax.random.key(0), x))


@pytest.mark.parametrize("name", SPECS)
def test_a_fused_block_is_the_block(name):
    """In float64, borders included, and its kernel is the response to unit impulses."""
    spec, options = SPECS[name]
    with jax.enable_x64(True):
        block, variables = block_and_variables(spec, options)
        x = jnp.asarray(random_images((2, 40, 40, 4), dtype=np.float64))
        expected = quick_jit(block.apply)(variables, x)
        fused = fuse_model(block, variables, x)
        got = quick_jit(block.clone(deploy=True).apply)(fused, x)
        chex.assert_trees_all_close(got, expected, atol=1e-12, rtol=1e-12)
        size = fused["params"]["reparam"]["kernel"].shape[0]
        if size <= 7:
            probed = fuse_linear(
                quick_jit(lambda x: block.apply(variables, x)),
                in_channels=4,
                max_kernel=11,
                dtype=jnp.float64,
                tolerance=1e-12,
            )
            dense = fuse_linear(
                quick_jit(lambda x: block.clone(deploy=True).apply(fused, x)),
                in_channels=4,
                max_kernel=11,
                dtype=jnp.float64,
                tolerance=1e-12,
            )
            chex.assert_trees_all_close(probed, dense, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_leaves_and_macs_are_those_of_the_module(name):
    spec, options = SPECS[name]
    block, variables = block_and_variables(spec, options)
    geometry = block.geometry(jnp.zeros((1, 8, 8, 4)))
    expected = {
        (leaf.collection, leaf.name, leaf.leaf): leaf.shape
        for leaf in reparam.leaves(spec.train, geometry)
    }
    paths, _ = jax.tree_util.tree_flatten_with_path(variables)
    assert {tuple(part.key for part in path): leaf.shape for path, leaf in paths} == expected
    convs = [np.prod(shape) for (_, _, leaf), shape in expected.items() if leaf == "kernel"]
    if options.get("stride", 1) == 1:
        assert reparam.macs(spec.train, geometry, 8, 8) == 64 * sum(convs)


@pytest.mark.parametrize("name", [n for n in SPECS if SPECS[n][0] is not MINE])
def test_float32_agrees_with_float64(name):
    spec, options = SPECS[name]
    with jax.enable_x64(True):
        block, variables = block_and_variables(spec, options, activation=nn.silu)
        x = jnp.asarray(random_images((1, 12, 12, 4), dtype=np.float64))
        expected = np.asarray(quick_jit(block.apply)(variables, x))
        fused = fuse_model(block, variables, x)
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), fused)
    deploy = block.clone(deploy=True, dtype=jnp.float32, param_dtype=jnp.float32)
    got = quick_jit(deploy.apply)(narrow, np.asarray(x, np.float32))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "spec", [REPVGG, ACB, mobileone(3, branches=2), QAREPVGG], ids=lambda s: s.name
)
def test_unfusing_inverts_fusing(spec):
    with jax.enable_x64(True):
        options = {"groups": 4} if spec.name.startswith("MobileOne") else {}
        block, target = block_and_variables(spec, options)
        like = randomise(target, seed=1)
        x = jnp.asarray(random_images((1, 8, 8, 4), dtype=np.float64))
        if spec.traceless:
            with pytest.raises(ValueError, match="fuse_model"):
                fuse_params(target, blocks=(spec,))
            return
        deployed = fuse_params(target, blocks=(spec,))
        again = reparam.unfuse_params(deployed, like=like, blocks=(spec,))
        chex.assert_trees_all_close(
            block.apply(again, x), block.apply(target, x), atol=1e-11, rtol=1e-11
        )
        kept = sorted(spec.required | spec.optional)[0]
        assert kept in again["params"]


def test_a_block_without_an_inverse_says_so():
    _, target = block_and_variables(MINE, {})
    deployed = {"params": {"reparam": {"kernel": np.zeros((5, 5, 4, 4)), "bias": np.zeros(4)}}}
    with pytest.raises(ValueError, match=r"fuse_model|no inverse"):
        reparam.unfuse_params(deployed, like=target, blocks=(MINE,))


class TestRecognition:
    """A mapping is a block if and only if its children are exactly those of a spec."""

    @pytest.fixture
    def backbone(self):
        block = RepVGGBlock(4)
        x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
        return randomise(jax.eval_shape(block.init, jax.random.key(0), x))

    @pytest.mark.parametrize(
        "children", [("conv1x1", "bn1x1"), ("conv3x3", "bn3x3"), ("reparam",), ("reparam", "bn")]
    )
    def test_others_with_the_same_names_are_left_alone(self, backbone, children):
        neck = {child: {"kernel": np.ones((1, 1, 4, 4))} for child in children}
        tree = {"params": {"backbone": backbone["params"], "neck": neck}}
        tree["batch_stats"] = {"backbone": backbone["batch_stats"], "neck": {"bn1x1": {}}}
        fused = fuse_params(tree, expect=1)
        assert fused["params"]["neck"] is neck
        assert list(fused["params"]["backbone"]) == ["reparam"]

    def test_excluded_paths_are_left_alone(self, backbone):
        tree = {
            name: {"a": backbone[name], "b": {"c": backbone[name]}}
            for name in ("params", "batch_stats")
        }
        fused = fuse_params(tree, exclude=("b/*",), expect=1)
        assert fused["params"]["b"] is tree["params"]["b"]
        assert fused["batch_stats"] == {"b": tree["batch_stats"]["b"]}

    def test_only_the_given_blocks_are_fused(self, backbone):
        with pytest.raises(ValueError, match=r"no block.*ACB"):
            fuse_params(backbone, blocks=(ACB,))

    def test_a_head_named_aux_of_somebody_else_stays(self, backbone):
        head = {name: {"kernel": np.ones(1)} for name in ("conv", "bn", "logits")}
        tree = {
            "params": {"block": backbone["params"], "aux_head": head, "aux_block": head},
            "batch_stats": {"block": backbone["batch_stats"]},
        }
        assert set(fuse_params(tree)["params"]) == {"block", "aux_head"}

    def test_concrete_leaves_inside_a_trace(self, backbone):
        variables = jax.tree.map(jnp.asarray, backbone)
        traced = jax.jit(lambda: fuse_params(variables))()
        chex.assert_trees_all_close(traced, fuse_params(variables), rtol=1e-5, atol=1e-6)

    def test_nothing_is_mutated(self, backbone):
        before = jax.tree.map(np.copy, backbone)
        fuse_params(backbone)
        reparam.unfuse_params(fuse_params(backbone), like=backbone)
        chex.assert_trees_all_equal(backbone, before)


class TestFuseModel:
    class Net(nn.Module):
        """Blocks at several depths, two of which have an identity without a norm."""

        deploy: bool = False

        @nn.compact
        def __call__(self, x):
            x = ReparamBlock(8, spec=QAREPVGG, deploy=self.deploy, name="first")(x)
            x = ReparamBlock(8, spec=QAREPVGG, deploy=self.deploy, name="second")(x)
            x = nn.Conv(8, (1, 1), name="conv1x1")(x)
            return nn.Sequential([RepVGGBlock(8, deploy=self.deploy, activation=nn.silu)])(x)

    def test_blocks_of_any_model(self):
        x = random_images((2, 8, 8, 3))
        model = self.Net()
        variables = randomise(jax.eval_shape(model.init, jax.random.key(0), x))
        fused = fuse_model(model, variables, x, expect=3)
        assert fused["params"]["conv1x1"] is variables["params"]["conv1x1"]
        assert "batch_stats" not in fused
        expected = model.apply(variables, x)
        got = self.Net(deploy=True).apply(fused, x)
        chex.assert_trees_all_close(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))

    def test_as_many_as_expected(self):
        x = random_images((2, 8, 8, 3))
        model = self.Net()
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        with pytest.raises(ValueError, match=r"3 blocks.*expected 2"):
            fuse_model(model, variables, x, expect=2)


class TestFuseLinear:
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: jax.nn.relu(x), "not affine"),
            (lambda x: x * jnp.arange(x.shape[1])[None, :, None, None], "position"),
            (
                lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")[:, :-2, :-2],
                "borders",
            ),
            (lambda x: x.mean(axis=(1, 2)), "shape"),
        ],
    )
    def test_what_is_not_a_convolution_is_refused(self, function, message):
        with pytest.raises(ValueError, match=message):
            fuse_linear(function, in_channels=2, max_kernel=5)

    def test_a_strided_convolution(self):
        kernel = random_images((3, 3, 2, 5))
        found = fuse_linear(
            lambda x: jax.lax.conv_general_dilated(
                x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            in_channels=2,
        )
        np.testing.assert_allclose(found.kernel, kernel, atol=1e-5)
        np.testing.assert_allclose(found.bias, np.zeros(5), atol=1e-6)


class TestSpecs:
    def test_names_must_differ(self):
        with pytest.raises(ValueError, match="a occurs more than once"):
            reparam.BlockSpec("x", reparam.Sum((reparam.Norm("a"), reparam.Conv("a", (3, 3)))))

    def test_kernels_are_odd(self):
        with pytest.raises(ValueError, match=r"\(2, 3\) must be odd"):
            reparam.BlockSpec("x", reparam.Conv("a", (2, 3)))

    def test_one_term_takes_the_stride(self):
        convs = (reparam.Conv("a", (1, 1)), reparam.Conv("b", (1, 1)))
        with pytest.raises(ValueError, match="strided=False"):
            reparam.BlockSpec("x", reparam.Chain(convs))

    def test_a_module_and_a_spec_that_do_not_fit(self):
        block = ReparamBlock(8, spec=reparam.BlockSpec("x", reparam.Norm("a")))
        with pytest.raises(ValueError, match=r"4 channels.*8"):
            block.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))


@pytest.mark.parametrize("activation", [nn.relu, nn.silu, None])
def test_forms_agree_with_any_activation(activation):
    """Training term by term, the fast pass, and the running statistics it leaves."""
    with jax.enable_x64(True):
        block, variables = block_and_variables(REPVGG, {}, activation=activation)
        x = jnp.asarray(random_images((4, 8, 8, 4), dtype=np.float64))
        results = [
            quick_jit(
                functools.partial(
                    block.clone(train_form=form, epsilon=1e-3, momentum=0.8).apply,
                    train=True,
                    mutable=["batch_stats"],
                )
            )(variables, x)
            for form in ("branches", "covariance")
        ]
        chex.assert_trees_all_close(*results, atol=1e-10, rtol=1e-10)


def test_epsilon_is_respected():
    with jax.enable_x64(True):
        block, variables = block_and_variables(REPVGG, {})
        block = block.clone(epsilon=1e-1)
        x = jnp.asarray(random_images((1, 8, 8, 4), dtype=np.float64))
        fused = fuse_params(variables, epsilon=1e-1)
        chex.assert_trees_all_close(
            block.clone(deploy=True).apply(fused, x), block.apply(variables, x), atol=1e-12
        )
