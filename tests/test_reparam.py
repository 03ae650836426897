"""Blocks as expressions: each spec against the impulse response of the module that trains it."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import (
    ReparamBlock,
    RepVGGBlock,
    create_model,
    fuse_linear,
    fuse_model,
    fuse_params,
    reparam,
    unfuse_params,
)
from repvgg_jax.reparam import ACB, DBB, QAREPVGG, REPVGG, conv_bn, large_kernel, mobileone
from tests.helpers.jit import quick_jit
from tests.helpers.trees import TINY_AUXILIARY, random_images, random_variables, randomize

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
SEPARABLE = reparam.BlockSpec(
    "separable",
    reparam.Sum(
        (
            reparam.Chain(
                (
                    reparam.Conv("depthwise", (3, 3), groups=4, expansion=1),
                    reparam.Norm("bn"),
                    reparam.Conv("pointwise", (1, 1), strided=False),
                )
            ),
            reparam.Conv("direct", (1, 1), bias=True),
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
    "DBB, dilation": (DBB, {"dilation": 2}),
    "MobileOne depthwise": (mobileone(3, branches=3), {"groups": 4}),
    "MobileOne depthwise, stride": (mobileone(3, branches=2), {"groups": 4, "stride": 2}),
    "MobileOne pointwise": (mobileone(1, branches=2), {}),
    "QARepVGG": (QAREPVGG, {}),
    "QARepVGG, stride and groups": (QAREPVGG, {"stride": 2, "groups": 2}),
    "conv-BN": (conv_bn(1), {}),
    "conv-BN, stride and groups": (conv_bn(3), {"stride": 2, "groups": 2}),
    "large kernel": (large_kernel(31, 5), {"groups": 4}),
    "pre-norm, dilated, subtracted": (MINE, {}),
    "depthwise, then pointwise": (SEPARABLE, {}),
    "depthwise, then pointwise, groups": (SEPARABLE, {"stride": 2, "groups": 2}),
}


def block_and_variables(spec, options, *, activation=None, features=4):
    """A block in float64 with random parameters and statistics."""
    options = {"features": features, **options}
    block = ReparamBlock(
        spec=spec,
        activation=activation,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        lowering="plain",
        **options,
    )
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float64)
        return block, randomize(jax.eval_shape(block.init, jax.random.key(0), x))


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
        like = randomize(target, seed=1)
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


def test_the_inverse_solves_for_any_term_that_it_can():
    scaled = reparam.Chain((reparam.Conv("a", (3, 3)), reparam.Scale("gain")))
    normed = reparam.Chain((reparam.Conv("b", (3, 3)), reparam.Norm("bn")))
    spec = reparam.BlockSpec("x", reparam.Sum((scaled, normed)))
    _, target = block_and_variables(spec, {})
    deployed = fuse_params(target, blocks=(spec,))
    again = reparam.unfuse_params(deployed, like=randomize(target, seed=1), blocks=(spec,))
    chex.assert_trees_all_close(fuse_params(again, blocks=(spec,)), deployed, atol=1e-12)


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
        return randomize(jax.eval_shape(block.init, jax.random.key(0), x))

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

    @pytest.mark.parametrize("function", [fuse_params, unfuse_params])
    def test_a_path_that_names_nothing_is_refused(self, backbone, function):
        """A typo would leave what was meant to be rewritten in silence."""
        trees = {"like": backbone} if function is unfuse_params else {}
        tree = fuse_params(backbone) if function is unfuse_params else backbone
        with pytest.raises(ValueError, match="no path 'neck', 'deco"):
            function(tree, exclude=("neck", "deco*"), **trees)
        both = {name: {"neck": backbone[name], "a": backbone[name]} for name in backbone}
        assert fuse_params(both, exclude="neck", expect=1)["params"]["neck"] is backbone["params"]

    @pytest.mark.parametrize("dtype", [np.int32, np.complex64, object])
    def test_leaves_that_are_no_real_numbers_are_refused(self, backbone, dtype):
        wrong = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), backbone)
        with pytest.raises(ValueError, match=f"{np.dtype(dtype)}, expected floating"):
            fuse_params(wrong)

    @pytest.mark.parametrize(
        "options", [{"epsilon": -1}, {"epsilon": float("nan")}, {"blocks": ("repvgg",)}]
    )
    def test_options_that_cannot_be(self, backbone, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            fuse_params(backbone, **options)

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
        # NumPy arrays in `like` beside traced ones.
        back = jax.jit(lambda fused: unfuse_params(fused, like=backbone))(traced)
        again = fuse_params(back)
        chex.assert_trees_all_close(again, fuse_params(variables), rtol=1e-4, atol=1e-5)

    def test_impulses_inside_a_trace(self):
        weight = np.arange(6.0, dtype=np.float32).reshape(2, 3)
        probe = functools.partial(fuse_linear, in_channels=2, max_kernel=3)
        inside = jax.jit(lambda: probe(lambda x: x @ weight))()
        np.testing.assert_allclose(inside.kernel[0, 0], weight, atol=1e-6)
        with pytest.raises(ValueError, match=r"outside of jax\.jit"):
            jax.jit(lambda w: probe(lambda x: x @ w))(weight)

    def test_lists_keep_their_places(self, backbone):
        norm = {"scale": np.ones(4), "bias": np.zeros(4)}
        moments = {"mean": np.ones(4), "var": np.ones(4)}
        for make in (list, tuple, lambda pair: collections.namedtuple("Pair", "a b")(*pair)):
            tree = {
                "params": {"layers": make([backbone["params"], {"bn": norm}])},
                "batch_stats": {"layers": make([backbone["batch_stats"], {"bn": moments}])},
            }
            fused = fuse_params(tree, expect=1)
            assert fused["batch_stats"]["layers"][0] == {}
            assert fused["batch_stats"]["layers"][1]["bn"] is moments
            again = reparam.unfuse_params(fused, like=tree)
            chex.assert_trees_all_equal_shapes(again, tree)

    def test_a_list_of_nothing_but_blocks_has_no_statistics(self, backbone):
        tree = {name: {"layers": [backbone[name]] * 2} for name in ("params", "batch_stats")}
        assert set(fuse_params(tree, expect=2)) == {"params"}

    @pytest.mark.parametrize("wrap", [lambda tree: tree, lambda tree: {"net": tree}])
    def test_blocks_without_norms_need_no_statistics(self, wrap):
        spec = reparam.BlockSpec("x", reparam.Conv("a", (1, 1), bias=True))
        child = {"kernel": np.ones((1, 1, 2, 3)), "bias": np.ones(3)}
        fused = fuse_params({"params": wrap({"a": child})}, blocks=(spec,))
        chex.assert_trees_all_equal(fused, {"params": wrap({"reparam": child})})

    def test_specs_that_differ_in_kernel_sizes_alone(self):
        specs = (large_kernel(7, 3), large_kernel(5, 3))
        _, variables = block_and_variables(specs[1], {})
        fused = fuse_params(variables, blocks=specs)
        assert fused["params"]["reparam"]["kernel"].shape == (5, 5, 4, 4)

    def test_empty_mappings_are_not_blocks(self, backbone):
        optional = reparam.BlockSpec("x", reparam.SameShape(reparam.Norm("a")))
        tree = {name: {"block": backbone[name], "empty": {}} for name in backbone}
        assert fuse_params(tree, blocks=(REPVGG, optional), expect=1)["params"]["empty"] == {}

    def test_without_convolutions_there_are_no_groups_to_see(self):
        spec = reparam.BlockSpec("x", reparam.Norm("a"))
        block, x = ReparamBlock(4, spec=spec), jnp.zeros((1, 8, 8, 4))
        variables = block.init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="fuse_model"):
            fuse_params(variables, blocks=(spec,))
        fused = fuse_model(block, variables, x)
        assert fused["params"]["reparam"]["kernel"].shape == (1, 1, 4, 4)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("depthwise, then pointwise", {}),
            ("depthwise, then pointwise", {"groups": 2, "features": 8}),
            ("pre-norm", {"groups": 2, "features": 8}),
            ("two convolutions", {"groups": 4, "stride": 2}),
        ],
    )
    def test_groups_that_only_inner_terms_show(self, name, options):
        pre = (reparam.Norm("pre"), reparam.Conv("a", (3, 3)))
        two = (reparam.Conv("a", (3, 3)), reparam.Norm("n"), reparam.Conv("b", (1, 1), False))
        spec = {
            "depthwise, then pointwise": SEPARABLE,
            "pre-norm": reparam.BlockSpec("x", reparam.Chain(pre)),
            "two convolutions": reparam.BlockSpec("x", reparam.Chain(two)),
        }[name]
        with jax.enable_x64(True):
            block, variables = block_and_variables(spec, dict(options))
            x = jnp.zeros((1, 8, 8, 4), jnp.float64)
            expected = fuse_model(block, variables, x)
            got = fuse_params(variables, blocks=(spec,))
        chex.assert_trees_all_close(got, expected, atol=1e-14)

    @pytest.mark.parametrize("collection", ["params", "batch_stats"])
    def test_arrays_in_the_place_of_mappings(self, backbone, collection):
        damaged = {**backbone, collection: {**backbone[collection], "bn_identity": np.ones(4)}}
        with pytest.raises(ValueError, match="bn_identity is a ndarray, expected a mapping"):
            fuse_params(damaged)

    def test_stacks_of_every_block_without_implicit_broadcasting(self):
        pool = reparam.Chain((reparam.AvgPool((5, 5)), reparam.Norm("bn_pool")))
        spec = reparam.BlockSpec("x", reparam.Sum((pool, reparam.AvgPool((7, 7)), REPVGG.train)))
        for known in (REPVGG, DBB, spec):
            _, variables = block_and_variables(known, {})
            with jax.enable_x64(True):
                parts = [randomize(variables, seed) for seed in range(6)]
                stack = jax.tree.map(
                    lambda *leaves: jnp.stack(leaves).reshape(2, 3, *leaves[0].shape), *parts
                )
                expected = [fuse_params(part, blocks=(known,))["params"] for part in parts]
                expected = jax.tree.map(
                    lambda *leaves: np.stack(leaves).reshape(2, 3, *leaves[0].shape), *expected
                )
                for tree in (stack, jax.device_get(stack)):
                    got = fuse_params(tree, blocks=(known,))["params"]
                    chex.assert_trees_all_close(got, expected, atol=1e-12)

    @pytest.mark.parametrize("spec", [REPVGG, DBB], ids=lambda s: s.name)
    @pytest.mark.parametrize(
        "axes", [(None, "b"), pytest.param(("a", "b"), marks=pytest.mark.slow)], ids=str
    )
    def test_explicitly_sharded_arrays(self, spec, axes):
        """`jax.make_mesh` makes explicit meshes by default."""
        mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
        block = ReparamBlock(4, spec=spec)
        x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
        variables = randomize(jax.eval_shape(block.init, jax.random.key(0), x))

        def put(leaf):
            spec = (None, None, *axes) if leaf.ndim == 4 else ("b",)
            return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

        for fuse in (fuse_params, jax.jit(fuse_params)):
            fused = fuse(jax.tree.map(put, variables))
            kernel = fused["params"]["reparam"]["kernel"]
            assert kernel.sharding.spec == jax.P(None, None, *axes)
            got = jax.device_get(fused)
            chex.assert_trees_all_close(got, fuse_params(variables), atol=1e-5)

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
        variables = randomize(jax.eval_shape(model.init, jax.random.key(0), x))
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

    def test_auxiliary_heads_are_dropped(self):
        model = create_model(TINY_AUXILIARY, num_classes=3)
        variables = random_variables(model)
        fused = fuse_model(model, variables, random_images((1, 32, 32, 3)))
        chex.assert_trees_all_equal_shapes(fused, fuse_params(variables))

    @pytest.mark.parametrize("given_as", [np.asarray, jnp.asarray])
    def test_impossible_variances(self, given_as):
        x = random_images((2, 8, 8, 3))
        variables = randomize(jax.eval_shape(self.Net().init, jax.random.key(0), x))
        variables["batch_stats"]["first"]["bn"]["var"][0] = -1
        with pytest.raises(ValueError, match="first/bn/var"):
            fuse_model(self.Net(), jax.tree.map(given_as, variables), x)


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

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x * jnp.nan, "NaN"),
            (lambda x: 1e6 + jax.nn.relu(x), "not affine"),
            (lambda x: x[:, ::2], "stride"),
            (lambda x: x[:, :5, :5], "stride that divides"),
        ],
    )
    def test_what_cannot_be_read_off_is_refused(self, function, message):
        with pytest.raises(ValueError, match=message):
            fuse_linear(function, in_channels=2, max_kernel=5)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x.mean((1, 2), keepdims=True), "gives 1 of 12 pixels"),
            (lambda x: x[:, ::6, ::6], "gives 2 of 12 pixels"),
            (lambda x: x[:1], r"shape \(1, .*2 images"),
            (lambda x: 1j * x, "gives complex64"),
            (lambda x: (x, x), "gives tuple"),
        ],
    )
    def test_outputs_of_other_kinds(self, function, message):
        with pytest.raises(ValueError, match=message):
            fuse_linear(function, in_channels=2, max_kernel=5)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"max_kernel": -3}, "max_kernel=-3"),
            ({"max_kernel": 2.5}, r"max_kernel=2\.5"),
            ({"spatial_dims": 0}, "spatial_dims=0"),
            ({"in_channels": 0}, "in_channels=0"),
            ({"dtype": jnp.int32}, "floating point"),
            ({"tolerance": np.nan}, "tolerance=nan"),
        ],
    )
    def test_numbers_that_are_not_allowed(self, option, message):
        with pytest.raises(ValueError, match=message):
            fuse_linear(lambda x: x, **{"in_channels": 2, "max_kernel": 5, **option})

    def test_half_precision_has_its_own_tolerance(self):
        found = fuse_linear(lambda x: 3 * x + 1, in_channels=2, dtype=jnp.bfloat16)
        np.testing.assert_allclose(found.kernel[0, 0].astype(np.float32), 3 * np.eye(2))
        with pytest.raises(ValueError, match="not affine"):
            fuse_linear(jax.nn.relu, in_channels=2, dtype=jnp.bfloat16)

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

    def test_one_term_of_a_chain_sees_neighbors_along_an_axis(self):
        conv = reparam.Conv("a", (3, 3), strided=False)
        for other in (reparam.Conv("b", (3, 3)), reparam.AvgPool((1, 3))):
            with pytest.raises(ValueError, match="along the same axis"):
                reparam.BlockSpec("x", reparam.Chain((conv, other)))
        row, column = reparam.Conv("a", (1, 3), strided=False), reparam.Conv("b", (3, 1))
        assert reparam.BlockSpec("x", reparam.Chain((row, column)))

    @pytest.mark.parametrize(
        ("term", "message"),
        [
            (reparam.Conv("a", 3), "must be a tuple"),
            (reparam.Conv("a", (3,)), "must be a tuple"),
            (reparam.Conv("a", (3, 3), dilation=0), "dilation=0"),
            (reparam.Conv("a", (3, 3), groups=0), "groups=0"),
            (reparam.Sum((reparam.Norm("a"), "b")), "'b' is not a term"),
            (reparam.Identity(), "no term has parameters"),
        ],
    )
    def test_mistakes_in_a_term(self, term, message):
        with pytest.raises(ValueError, match=message):
            reparam.BlockSpec("x", term)

    def test_kept_children_have_names_of_their_own(self):
        with pytest.raises(ValueError, match="must be a set"):
            reparam.BlockSpec("x", reparam.Norm("a"), keep="se")
        with pytest.raises(ValueError, match="occurs more than once"):
            reparam.BlockSpec("x", reparam.Norm("a"), keep={"a"})

    def test_a_convolution_does_not_mix_the_groups_of_its_block(self):
        convs = (reparam.Conv("a", (1, 1), strided=False), reparam.Conv("b", (3, 3), groups=1))
        block = ReparamBlock(4, groups=2, spec=reparam.BlockSpec("x", reparam.Chain(convs)))
        with pytest.raises(ValueError, match=r"b has 1 groups.*mix"):
            block.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))

    def test_a_module_and_a_spec_that_do_not_fit(self):
        block = ReparamBlock(8, spec=reparam.BlockSpec("x", reparam.Norm("a")))
        with pytest.raises(ValueError, match=r"4 channels.*8"):
            block.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))


def test_gradients_of_a_dilated_pooling_are_those_of_its_kernel():
    with jax.enable_x64(True):
        block, variables = block_and_variables(DBB, {"dilation": 2, "stride": 2})
        fused = fuse_params(variables)
        x = jnp.asarray(random_images((1, 9, 8, 4), dtype=np.float64))
        trained, deployed = (
            jax.grad(lambda x, f=form, v=v: jnp.sin(f.apply(v, x)).sum())(x)
            for form, v in ((block, variables), (block.clone(deploy=True), fused))
        )
        chex.assert_trees_all_close(trained, deployed, atol=1e-11)


class TestEquivalentL2:
    def test_dilated_kernels_are_added_where_they_deploy(self):
        branches = [
            reparam.Chain(
                (reparam.Conv(name, (3, 3), dilation=dilation), reparam.Norm(f"bn{name}"))
            )
            for name, dilation in (("a", 2), ("b", 1))
        ]
        spec = reparam.BlockSpec("x", reparam.Sum(branches))
        _, variables = block_and_variables(spec, {})
        expected, (params, stats) = 0.0, (variables["params"], variables["batch_stats"])
        t = {n: params[f"bn{n}"]["scale"] / np.sqrt(stats[f"bn{n}"]["var"] + 1e-5) for n in "ab"}
        for row, column in np.ndindex(5, 5):
            there = {}
            if row % 2 == 0 and column % 2 == 0:
                there["a"] = params["a"]["kernel"][row // 2, column // 2]
            if 1 <= row <= 3 and 1 <= column <= 3:
                there["b"] = params["b"]["kernel"][row - 1, column - 1]
            if there:
                total = sum(kernel * t[n] for n, kernel in there.items())
                expected += (total**2 / sum(t[n] ** 2 for n in there)).sum()
        got = reparam.equivalent_l2(variables, blocks=(spec,))
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_blocks_without_such_kernels_have_no_penalty(self):
        _, variables = block_and_variables(QAREPVGG, {})
        assert reparam.equivalent_l2(variables) == 0
        assert reparam.equivalent_l2({"params": {}}) == 0

    def test_statistics_are_needed(self):
        _, variables = block_and_variables(REPVGG, {})
        with pytest.raises(ValueError, match="block has no running statistics of bn3x3"):
            reparam.equivalent_l2({"params": {"block": variables["params"]}})


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


def test_gradients_of_a_block_with_padded_borders_are_those_of_its_fused_form():
    with jax.enable_x64(True):
        block, variables = block_and_variables(DBB, {})
        variables = jax.tree.map(jnp.asarray, variables)
        x = jnp.asarray(random_images((1, 5, 5, 4), dtype=np.float64))

        def trained(variables):
            return jnp.square(block.apply(variables, x)).sum()

        def fused(variables):
            deployed = fuse_params(variables)
            return jnp.square(block.clone(deploy=True).apply(deployed, x)).sum()

        gradients = [quick_jit(jax.grad(loss))(variables) for loss in (trained, fused)]
        chex.assert_trees_all_close(*gradients, rtol=1e-9, atol=1e-9)


def test_the_dtype_of_a_fused_kernel_is_that_of_the_kernels():
    _, variables = block_and_variables(REPVGG, {})
    mixed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(jnp.bfloat16 if path[-1].key == "kernel" else np.float32),
        variables,
    )
    fused = fuse_params(mixed)
    assert fused["params"]["reparam"]["kernel"].dtype == jnp.bfloat16
    again = reparam.unfuse_params(fused, like=mixed)
    assert jax.tree.map(lambda a: a.dtype, again) == jax.tree.map(lambda a: a.dtype, mixed)
