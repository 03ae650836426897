"""Fusing, held to an oracle that knows no formula: a block's response to unit impulses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_jax import (
    VARIANTS,
    ReparamBlock,
    RepVGG,
    RepVGGBlock,
    Variant,
    create_model,
    fuse_params,
    reparam,
    unfuse_params,
)
from repvgg_jax.layers import BatchNorm
from tests.helpers.jit import quick_jit
from tests.helpers.trees import (
    TINY,
    TINY_AUXILIARY,
    paths,
    random_images,
    random_leaf,
    random_variables,
    randomize,
)

pytestmark = pytest.mark.core
KEY = jax.random.key(0)


def create_abstract(variant: Variant):
    """The shapes of a network's variables."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(create_model(variant, num_classes=3).init, KEY, x)


def block_variables(block: RepVGGBlock, in_channels: int, seed: int = 0):
    x = jax.ShapeDtypeStruct((1, 8, 8, in_channels), jnp.float32)
    return randomize(jax.eval_shape(block.init, jax.random.key(0), x), seed)


def linear_response(block: RepVGGBlock, variables, x: np.ndarray) -> np.ndarray:
    """What the branches add up to, before squeeze-and-excite and ReLU: float64."""
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        block = block.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        _, state = quick_jit(
            lambda variables, x: block.apply(
                variables,
                x,
                capture_intermediates=lambda module, _: isinstance(module, BatchNorm),
            )
        )(variables, jnp.asarray(x, jnp.float64))
        branches = [child["__call__"][0] for child in state["intermediates"].values()]
        assert len(branches) in (2, 3)
        return np.asarray(sum(branches))


def impulse_kernel(
    block: RepVGGBlock, variables, in_channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (3, 3, in/groups, out) and bias (out,) read off the block's responses."""
    reach = 2 * block.dilation * block.stride  # stays clear of the borders
    size = 2 * reach + 1
    center = -(-size // block.stride) // 2
    where = center * block.stride  # the input pixel under the output pixel in the middle
    impulses = np.zeros((3, 3, in_channels, size, size, in_channels))
    for row, column, channel in np.ndindex(3, 3, in_channels):
        y, x = (where + (tap - 1) * block.dilation for tap in (row, column))
        impulses[row, column, channel, y, x, channel] = 1
    nothing = np.zeros((1, size, size, in_channels))
    images = np.concatenate([nothing, impulses.reshape(-1, size, size, in_channels)])
    bias, *responses = linear_response(block, variables, images)[:, center, center]
    out, per_group = bias.shape[0], in_channels // block.groups
    response = np.reshape(responses, (3, 3, in_channels, out)) - bias
    kernel = np.zeros((3, 3, per_group, out))
    for o in range(out):
        first = o // (out // block.groups) * per_group
        kernel[..., o] = response[:, :, first : first + per_group, o]
        outside = np.delete(response[..., o], np.s_[first : first + per_group], axis=2)
        assert not outside.any(), "another group leaked in"
    return kernel, bias


@settings(max_examples=12, deadline=None)
@given(
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    in_per_group=st.integers(1, 3),
    out_per_group=st.integers(1, 3),
    se=st.sampled_from([None, {"reduction": 1}, {"reduction": 1, "after_relu": True}]),
    seed=st.integers(0, 2**16),
)
def test_the_deploy_kernel_is_the_response_to_unit_impulses(
    stride, dilation, groups, in_per_group, out_per_group, se, seed
):
    in_channels, out_channels = groups * in_per_group, groups * out_per_group
    variant = Variant("any", (1,), (8,), 8, se=se)  # a mapping becomes a SqueezeExcite
    block = RepVGGBlock(
        out_channels, stride=stride, dilation=dilation, groups=groups, se=variant.se
    )
    variables = block_variables(block, in_channels, seed)
    assert ("bn_identity" in variables["params"]) == (stride == 1 and in_per_group == out_per_group)
    kernel, bias = impulse_kernel(block, variables, in_channels)
    fused = fuse_params(variables)["params"]["reparam"]
    np.testing.assert_allclose(fused["kernel"], kernel, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fused["bias"], bias, rtol=1e-6, atol=1e-6)


def shallow(name: str) -> Variant:
    """Every distinct kind of block of a variant at its real width, once or twice."""
    full = VARIANTS[name]
    g = max(layer.groups for layer in full.layers())
    return Variant(
        name,
        depths=(2, 2, 2, 1) if g == 1 else (3, 3, 3, 1),
        channels=full.channels,
        stem_channels=full.stem_channels,
        groups=1 if g == 1 else (1, g, 1) * 3 + (1,),
        se=full.se,
    )


@functools.cache
def applied(model):
    """A compiled function of variables and images."""
    return quick_jit(model.apply)


def relative(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


ALL = [n if n == "A0" else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]


@pytest.mark.parametrize("name", ALL)
def test_all_fifteen_at_their_real_widths(name):
    model = create_model(shallow(name), num_classes=10)
    kinds = {(layer.identity, layer.groups, layer.features) for layer in VARIANTS[name].layers()}
    assert kinds == {(layer.identity, layer.groups, layer.features) for layer in model.layers}
    variables = random_variables(model)
    images = random_images((2, 32, 32, 3))
    trained = quick_jit(model.apply)(variables, images)
    fused = quick_jit(model.clone(deploy=True).apply)(fuse_params(variables), images)
    assert relative(fused, trained) <= 1e-5


@pytest.mark.parametrize("name", ALL)
def test_float64_agrees_to_twelve_digits(name):
    with jax.enable_x64(True):
        model = create_model(
            shallow(name), num_classes=10, dtype=jnp.float64, param_dtype=jnp.float64
        )
        variables = random_variables(model)
        images = random_images((1, 32, 32, 3), dtype=np.float64)
        trained = quick_jit(model.apply)(variables, images)
        assert trained.dtype == jnp.float64
        deploy = quick_jit(model.clone(deploy=True).apply)
        for fuse in (fuse_params, quick_jit(fuse_params)):  # by NumPy and by JAX
            assert relative(deploy(fuse(variables), images), trained) <= 1e-12


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dilated_networks_fuse_to_dilated_networks(output_stride):
    variant = Variant("d", (1, 2, 2, 1), (8, 8, 16, 16), 8, groups=2)
    model = create_model(variant, num_classes=0, output_stride=output_stride)
    variables = random_variables(model)
    images = random_images((2, 64, 64, 3))
    trained, fused = (
        quick_jit(functools.partial(net.apply, method="features"))(tree, images)
        for net, tree in (
            (model, variables),
            (model.clone(deploy=True), fuse_params(variables)),
        )
    )
    for stage in trained:
        assert relative(fused[stage], trained[stage]) <= 1e-5


class TestTrees:
    """What `fuse_params` takes and what it leaves alone."""

    model = create_model(TINY, num_classes=5)

    @pytest.fixture
    def variables(self):
        return random_variables(self.model)

    def test_deploy_tree_is_what_the_deploy_model_wants(self, variables):
        fused = fuse_params(variables)
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        wanted = jax.eval_shape(self.model.clone(deploy=True).init, jax.random.key(0), images)
        assert fused.keys() == {"params"}
        chex.assert_trees_all_equal_shapes_and_dtypes(fused, wanted)

    def test_it_is_pure_and_idempotent(self, variables):
        before = jax.tree.map(np.copy, variables)
        fused = fuse_params(variables)
        chex.assert_trees_all_equal(variables, before)
        assert fuse_params(fused) is fused
        assert fused["params"]["head"]["kernel"] is variables["params"]["head"]["kernel"]

    def test_numpy_in_numpy_out_with_float64_inside(self, variables):
        fused = fuse_params(variables)
        wide = fuse_params(jax.tree.map(lambda a: a.astype(np.float64), variables))
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(fused))
        chex.assert_trees_all_equal(
            fused, jax.tree.map(lambda a: a.astype(np.float32), wide)
        )  # rounded once, at the end

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_weights_are_rounded_once(self, variables, dtype):
        half = jax.tree.map(lambda a: a.astype(dtype), variables)
        wide = jax.tree.map(lambda a: a.astype(np.float64), half)
        chex.assert_trees_all_equal(
            fuse_params(half), jax.tree.map(lambda a: a.astype(dtype), fuse_params(wide))
        )
        on_device = fuse_params(jax.tree.map(jnp.asarray, half))
        assert on_device["params"]["stem"]["reparam"]["kernel"].dtype == dtype

    def test_under_jit(self, variables):
        chex.assert_trees_all_close(
            jax.jit(fuse_params)(variables), fuse_params(variables), rtol=1e-5, atol=1e-6
        )

    def test_an_ensemble_stacked_by_vmap(self, variables):
        members = [random_variables(self.model, seed=seed) for seed in range(3)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
        alone = jax.tree.map(lambda *leaves: np.stack(leaves), *map(fuse_params, members))
        chex.assert_trees_all_equal(fuse_params(stacked), alone)
        chex.assert_trees_all_close(jax.vmap(fuse_params)(stacked), alone, rtol=1e-5, atol=1e-6)

    def test_gradients_of_a_penalty_on_the_equivalent_kernel(self):
        block = RepVGGBlock(4)
        variables = block_variables(block, 4)
        stats = variables["batch_stats"]

        def penalty(params):
            fused = fuse_params({"params": params, "batch_stats": stats})
            return jnp.square(fused["params"]["reparam"]["kernel"]).sum()

        with jax.enable_x64(True):
            params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), variables["params"])
            stats = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), stats)
            found = quick_jit(jax.grad(penalty))(params)
            direction = randomize(params, seed=1)
            step = 1e-6
            up, down = (
                penalty(jax.tree.map(lambda p, d, s=s: p + s * step * d, params, direction))
                for s in (1, -1)
            )
            slope = sum(
                jnp.vdot(g, d)
                for g, d in zip(jax.tree.leaves(found), jax.tree.leaves(direction), strict=True)
            )
            np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-7)

    def test_arrays_on_devices(self):
        """They are folded in compiled programs, as exactly as NumPy's and one for all epsilons."""
        tree = randomize(create_abstract(TINY))
        arrays = jax.tree.map(jnp.asarray, tree)
        for epsilon in (1e-5, 1e-3, jnp.float32(1e-3), np.array(1e-2)):
            expected = fuse_params(tree, epsilon=float(epsilon))
            got = fuse_params(arrays, epsilon=epsilon)
            chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)
            assert list(got["params"]["stem"]["reparam"]) == ["kernel", "bias"]

        def total(epsilon):
            fused = fuse_params(arrays, epsilon=epsilon)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(fused))

        eager, compiled = jax.grad(total)(1e-3), jax.jit(jax.grad(total))(1e-3)
        np.testing.assert_allclose(eager, compiled, rtol=1e-4)

    def test_replicated_vectors_stay_replicated(self):
        """On meshes, the compiler is not asked for a sharding."""
        mesh = jax.make_mesh((4,), ("m",), (jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec

        def place(leaf):
            axes = spec(None, None, None, "m") if leaf.ndim == 4 else spec()
            return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, axes))

        fused = fuse_params(jax.tree.map(place, randomize(create_abstract(TINY))))
        bias = fused["params"]["stem"]["reparam"]["bias"]
        assert bias.sharding.is_fully_replicated

    def test_filters_of_functions_are_computed_each_time(self):
        side = {"x": 1.0}
        taps = reparam.Filter(lambda channels: np.full((3, 3, channels), side["x"]))
        chain = (taps, reparam.Conv("conv", (1, 1), strided=False), reparam.Norm("bn"))
        block = ReparamBlock(4, spec=reparam.BlockSpec("x", reparam.Chain(chain)))
        x = jnp.zeros((1, 8, 8, 4))
        variables = jax.tree.map(jnp.asarray, randomize(jax.eval_shape(block.init, KEY, x)))
        kernels = []
        for side["x"] in (1.0, 2.0):
            fused = fuse_params(variables, blocks=(block.spec,))
            kernels.append(fused["params"]["reparam"]["kernel"])
        np.testing.assert_allclose(2 * kernels[0], kernels[1], rtol=1e-6)

    @pytest.mark.parametrize("factor", [0.5, np.array(0.5), np.float32(0.5), "jax"])
    def test_factors_of_any_library(self, factor):
        factor = jnp.float32(0.5) if factor == "jax" else factor
        chain = (reparam.Conv("conv", (3, 3)), reparam.Norm("bn"), reparam.Scale(factor=factor))
        block = ReparamBlock(4, spec=reparam.BlockSpec("x", reparam.Chain(chain)))
        x = jnp.zeros((1, 8, 8, 4))
        variables = randomize(jax.eval_shape(block.init, KEY, x))
        fused = [
            fuse_params(tree, blocks=(block.spec,))
            for tree in (variables, jax.tree.map(jnp.asarray, variables))
        ]
        chex.assert_trees_all_close(*fused, rtol=1e-5, atol=1e-6)

    def test_sharded_arrays_stay_sharded_and_are_not_gathered(self, variables):
        mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

        def place(leaf):
            spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "model")
            if leaf.shape[-1] % 8:
                spec = jax.sharding.PartitionSpec()
            return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

        sharded = jax.tree.map(place, variables)
        fused = fuse_params(sharded)
        kernel = fused["params"]["stage2_block1"]["reparam"]["kernel"]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 16, 2)}
        chex.assert_trees_all_close(
            jax.device_get(fused), fuse_params(variables), rtol=1e-5, atol=1e-6
        )
        text = jax.jit(fuse_params).lower(sharded).compile().as_text()
        assert "all-gather" not in text
        assert "all-to-all" not in text

    def test_inside_a_larger_model(self, variables):
        """A detector: two backbones at different depths, a neck with its own normalization."""

        class Detector(nn.Module):
            deploy: bool = False

            @nn.compact
            def __call__(self, x):
                x = RepVGGBlock(8, deploy=self.deploy, name="early")(x)
                x = nn.Conv(8, (1, 1), name="conv3x3")(x)  # a name that blocks use too
                x = nn.BatchNorm(use_running_average=True, name="neck")(x)
                return RepVGG(TINY, num_classes=0, deploy=self.deploy, name="backbone")(x)

        images = random_images((2, 32, 32, 3))
        tree = randomize(jax.eval_shape(Detector().init, jax.random.key(0), images))
        fused = fuse_params(tree)
        assert fused["params"]["neck"] is tree["params"]["neck"]
        assert fused["params"]["conv3x3"] is tree["params"]["conv3x3"]
        assert fused["batch_stats"].keys() == {"neck"}
        expected = quick_jit(Detector().apply)(tree, images)
        found = quick_jit(Detector(deploy=True).apply)(fused, images)
        assert relative(found, expected) <= 1e-5

    def test_several_networks_in_any_container(self, variables):
        momentum = (variables["params"], {"count": 3})  # looks like blocks, is none
        tree = {"teacher": variables, "pair": [variables, "text"], "opt": momentum, "step": 7}
        fused = fuse_params(tree)
        alone = fuse_params(variables)
        chex.assert_trees_all_equal(fused["teacher"], alone)
        chex.assert_trees_all_equal(fused["pair"][0], alone)
        assert fused["opt"] is momentum
        assert (fused["pair"][1], fused["step"]) == ("text", 7)

    def test_ema_weights_with_more_collections_beside_them(self, variables):
        tree = {"ema": {**variables, "count": np.int32(3)}}
        fused = fuse_params(tree)
        assert fused["ema"].keys() == {"params", "count"}
        chex.assert_trees_all_equal(fused["ema"]["params"], fuse_params(variables)["params"])

    def test_frozen_dicts_stay_frozen(self, variables):
        fused = fuse_params(freeze(variables))
        assert type(fused) is type(freeze({}))
        chex.assert_trees_all_equal(fused.unfreeze(), fuse_params(variables))

    def test_a_half_fused_network(self, variables):
        deployed = fuse_params(variables)
        params = {**variables["params"], "stem": deployed["params"]["stem"]}
        stats = {k: v for k, v in variables["batch_stats"].items() if k != "stem"}
        chex.assert_trees_all_equal(fuse_params({"params": params, "batch_stats": stats}), deployed)

    def test_shapes_alone(self, variables):
        fused = jax.eval_shape(fuse_params, variables)
        chex.assert_trees_all_equal_shapes_and_dtypes(fused, fuse_params(variables))

    def test_another_epsilon(self):
        block = RepVGGBlock(4)
        variables = block_variables(block, 4)
        shifted = jax.tree_util.tree_map_with_path(
            lambda path, a: a + 1e-3 - 1e-5 if path[-1].key == "var" else a, variables
        )
        chex.assert_trees_all_close(
            fuse_params(variables, epsilon=1e-3), fuse_params(shifted), rtol=1e-6
        )


class TestUnfuse:
    @pytest.mark.parametrize("variant", [TINY, TINY_AUXILIARY], ids=lambda v: v.name)
    @pytest.mark.parametrize("given_as", [np.asarray, jnp.asarray])
    def test_the_inverse_computes_the_same_function(self, variant, given_as):
        model = create_model(variant, num_classes=5)
        deployed = jax.tree.map(given_as, fuse_params(random_variables(model)))
        like = jax.tree.map(given_as, random_variables(model, seed=7))
        variables = unfuse_params(deployed, like=like)
        chex.assert_trees_all_equal_shapes_and_dtypes(variables, like)
        chex.assert_trees_all_close(fuse_params(variables), deployed, rtol=1e-5, atol=2e-6)
        images = random_images((4, 32, 32, 3))
        expected = applied(model.clone(deploy=True))(deployed, images)
        assert relative(applied(model)(variables, images), expected) <= 1e-5

    def test_branches_of_like_are_kept_and_all_can_be_trained(self):
        model = create_model(TINY, num_classes=5)
        like = random_variables(model, seed=7)
        variables = unfuse_params(fuse_params(random_variables(model)), like=like)
        for name in ("conv1x1", "bn1x1", "bn_identity"):
            chex.assert_trees_all_equal(
                variables["params"]["stage2_block1"][name], like["params"]["stage2_block1"][name]
            )
        images = random_images((4, 32, 32, 3))

        def loss(params):
            logits, _ = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.square(logits).mean()

        gradients = quick_jit(jax.grad(loss))(variables["params"])
        assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))

    def test_statistics_of_other_modules_are_the_deployed_ones(self):
        variables = block_variables(RepVGGBlock(4), 4)
        neck = {"mean": np.ones(4), "var": np.ones(4)}
        tree = {
            "params": {"block": variables["params"], "neck": {"scale": np.ones(4)}},
            "batch_stats": {"block": variables["batch_stats"], "neck": neck},
        }
        like = jax.tree.map(lambda a: a + 1, tree)
        back = unfuse_params(fuse_params(tree), like=like)
        assert back["batch_stats"]["neck"]["mean"] is neck["mean"]
        chex.assert_trees_all_equal(back["batch_stats"]["block"], like["batch_stats"]["block"])

    def test_another_network(self):
        deployed = fuse_params(random_variables(create_model(TINY, num_classes=5)))
        other = random_variables(create_model(Variant("o", (1, 1), (8, 16), 8), num_classes=5))
        with pytest.raises(ValueError, match=r"has \[stage2_block1\] beyond it"):
            unfuse_params(deployed, like=other)

    def test_other_classes(self):
        deployed = fuse_params(random_variables(create_model(TINY, num_classes=5)))
        other = random_variables(create_model(TINY, num_classes=6))
        with pytest.raises(ValueError, match=r"head/\w+: shape \(.*5.*\), expected \(.*6.*\)"):
            unfuse_params(deployed, like=other)

    def test_a_tree_that_is_trainable_already(self):
        variables = random_variables(create_model(TINY, num_classes=5))
        with pytest.raises(ValueError, match="expected a deploy-form block with reparam"):
            unfuse_params(variables, like=variables)

    def test_like_without_blocks(self):
        deployed = fuse_params(random_variables(create_model(TINY, num_classes=5)))
        with pytest.raises(ValueError, match="`like` contains no training-form block"):
            unfuse_params(deployed, like=deployed)

    def test_no_variables(self):
        with pytest.raises(ValueError, match=r"`deployed` must be variables.*not a list"):
            unfuse_params([], like={})


class TestBadTrees:
    """Each message names the block and what is wrong with it."""

    @pytest.fixture
    def tree(self):
        variables = random_variables(create_model(TINY, num_classes=5))
        return jax.tree.map(np.copy, variables)

    def test_no_statistics(self, tree):
        with pytest.raises(
            ValueError, match=r"stage1_block0 has no running statistics: 'batch_stats'"
        ):
            fuse_params({"params": tree["params"]})

    def test_parameters_alone(self, tree):
        with pytest.raises(ValueError, match="stage1_block0 is a block outside any 'params'"):
            fuse_params(tree["params"])

    @pytest.mark.parametrize("other", [{}, {"params": {"Dense_0": {"kernel": np.ones(3)}}}, [], 3])
    def test_no_block(self, other):
        with pytest.raises(ValueError, match=r"no block to fuse.*blocks=\(spec,\).*fuse_model"):
            fuse_params(other)

    @pytest.mark.parametrize("child", ["conv3x3", "conv1x1", "bn3x3", "bn1x1"])
    def test_a_missing_branch_is_named_if_blocks_are_counted(self, tree, child):
        del tree["params"]["stage1_block0"][child]
        with pytest.raises(ValueError, match=rf"3 blocks of the 4.*stage1_block0.*\[{child}"):
            fuse_params(tree, expect=4)

    def test_missing_statistics_of_one_branch(self, tree):
        del tree["batch_stats"]["stem"]["bn1x1"]
        with pytest.raises(ValueError, match=r"missing \[bn1x1 in batch_stats\]"):
            fuse_params(tree)

    def test_an_unexpected_child(self, tree):
        tree["params"]["stem"]["conv5x5"] = {"kernel": np.ones((5, 5, 3, 8))}
        with pytest.raises(ValueError, match=r"3 blocks of the 4.*unexpected \[conv5x5\]"):
            fuse_params(tree, expect=4)

    def test_an_unexpected_leaf(self, tree):
        tree["params"]["stem"]["conv3x3"]["bias"] = np.ones(8)
        with pytest.raises(ValueError, match=r"stem/conv3x3 has \[bias, kernel\]"):
            fuse_params(tree)

    @pytest.mark.parametrize(
        ("piece", "leaf", "shape"),
        [
            ("conv3x3", "kernel", (5, 5, 3, 8)),
            ("conv1x1", "kernel", (1, 1, 4, 8)),
            ("bn3x3", "scale", (9,)),
        ],
    )
    def test_wrong_shapes(self, tree, piece, leaf, shape):
        tree["params"]["stem"][piece][leaf] = np.ones(shape, np.float32)
        with pytest.raises(ValueError, match=rf"stem/{piece}/{leaf}: shape .*expected"):
            fuse_params(tree)

    @pytest.mark.parametrize("value", [-1e-3, np.nan, np.inf])
    @pytest.mark.parametrize("given_as", [np.asarray, jnp.asarray])
    def test_impossible_variances(self, tree, value, given_as):
        tree["batch_stats"]["stage2_block1"]["bn_identity"]["var"][3] = value
        with pytest.raises(ValueError, match="stage2_block1/bn_identity/var: a running variance"):
            fuse_params(jax.tree.map(given_as, tree))

    def test_two_forms_in_one_block(self, tree):
        tree["params"]["stem"]["reparam"] = {}
        with pytest.raises(ValueError, match="stem contains both reparam and bn1x1"):
            fuse_params(tree)


def test_random_leaves_are_not_the_initial_ones():
    """The other tests mean little on fresh statistics."""
    rng = np.random.default_rng(0)
    assert random_leaf(rng, "var", (100,), np.float32).std() > 0.5
    assert random_leaf(rng, "scale", (100,), np.float32).min() < 0
    assert paths(random_variables(create_model(TINY)))[-1] == "params/stem/conv3x3/kernel"
