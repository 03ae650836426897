"""Every block of the literature: its fold, its cost, its inverse and how it starts.

One test per block and geometry compares the module that trains with the convolution that deploys,
borders included, and with its response to unit impulses, which knows no formula.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import ReparamBlock, fuse_linear, fuse_model, fuse_params, reparam
from repvgg_jax.reparam import REPVGG
from tests.helpers.jit import quick_jit
from tests.helpers.trees import random_images, randomize

CHANNELS = 4
DENSE = ({}, {"features": 8, "stride": 2, "groups": 2, "dilation": 2})
DEPTHWISE = ({"groups": CHANNELS}, {"groups": CHANNELS, "stride": 2})
MIXER = ({"groups": CHANNELS}, {"groups": CHANNELS, "dilation": 2})
BLOCKS = {
    **{
        f"ablation {name}": (spec, DENSE if name == "DiracNet" else DENSE[:1])
        for name, spec in reparam.ABLATIONS.items()
        if spec.obstacle is None and spec is not REPVGG
    },
    **{
        f"QARepVGG {name}": (spec, DENSE if name == "V1" else DENSE[:1])
        for name, spec in reparam.QAREPVGG_VERSIONS.items()
        if name not in ("V2", "V6")  # V6 is the ablation "identity without BN"
    },
    "ACB 5": (reparam.acb(5, initial=1 / 3), DENSE[1:]),
    "DBB depthwise": (reparam.dbb(depthwise=True), DEPTHWISE),
    "DBB 5": (reparam.dbb(5, single_init=True), DENSE[1:]),
    "MobileOne 5": (reparam.mobileone(5, branches=2), DEPTHWISE),
    "YOLOv10": (reparam.large_kernel(7, 3), DEPTHWISE[:1]),
    "UniRepLKNet": (reparam.dilated_reparam(9), ({"groups": CHANNELS},)),
    "RepViT": (reparam.repvit(), MIXER),
    "RepViT legacy": (reparam.repvit(5, legacy=True), MIXER[1:]),
    "FastViT": (reparam.fastvit(), MIXER),
    "FastViT without scale": (reparam.fastvit(7, layer_scale=None), MIXER[1:]),
    "FastViT position": (reparam.fastvit_position(), MIXER[:1]),
    "OREPA": (reparam.OREPA, DENSE),
    "ECB": (reparam.ecb(), DENSE[1:]),
    "ECB with identity": (reparam.ecb(3, identity=True), DENSE[:1]),
}
CORE = ("QARepVGG V1", "DBB depthwise", "RepViT", "FastViT", "OREPA", "ECB")
CASES = [
    pytest.param(
        spec,
        options,
        id=f"{name} {options or ''}".strip(),
        marks=[pytest.mark.core] if name in CORE else [],
    )
    for name, (spec, every) in BLOCKS.items()
    for options in every
]


def block_of(spec, options, dtype=jnp.float64, **more):
    options = {"features": CHANNELS, "activation": None, "lowering": "plain", **options}
    return ReparamBlock(spec=spec, dtype=dtype, param_dtype=dtype, **options, **more)


def variables_of(block, seed=0):
    x = jax.ShapeDtypeStruct((1, 8, 8, CHANNELS), block.dtype)
    return randomize(jax.eval_shape(block.init, jax.random.key(0), x), seed)


@pytest.mark.parametrize(("spec", "options"), CASES)
def test_the_fused_block_is_the_block(spec, options):
    with jax.enable_x64(True):
        block = block_of(spec, options)
        variables = variables_of(block)
        max_kernel = 2 * (max(spec.kernel_size(block.geometry(jnp.zeros((1, 8, 8, 4))))) // 2) + 1
        max_kernel *= options.get("dilation", 1)
        size = 4 * (max_kernel // 2) + 4  # as `fuse_linear` takes it: nothing is compiled twice
        images = random_images((CHANNELS, size, size, CHANNELS), dtype=np.float64)
        deploy = block.clone(deploy=True)

        @functools.cache
        def compiled(of):
            quick = {"xla_backend_optimization_level": 0}
            return jax.jit(of.apply, compiler_options=quick)

        def padded(x):  # to one number of images
            x = jnp.pad(x, ((0, CHANNELS - len(x)), (0, 0), (0, 0), (0, 0)))
            return compiled(block)(variables, x)

        expected = compiled(block)(variables, images)
        fused = fuse_model(block, variables, images)
        got = compiled(deploy)(fused, images)
        scale = float(jnp.abs(expected).max())
        chex.assert_trees_all_close(got, expected, atol=1e-12 * scale)

        probed = fuse_linear(
            lambda x: padded(x)[: len(x)],
            in_channels=CHANNELS,
            max_kernel=max_kernel,
            dtype=jnp.float64,
            tolerance=1e-12,
        )
        kernel = dense(fused["params"]["reparam"]["kernel"], block, options.get("dilation", 1))
        chex.assert_trees_all_close(probed.bias, fused["params"]["reparam"]["bias"], atol=1e-11)
        chex.assert_trees_all_close(probed.kernel, trimmed(kernel, probed.kernel), atol=1e-11)
        check_leaves_and_macs(spec, block, variables)

    narrow = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), fused)
    deploy = deploy.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    got = compiled(deploy)(narrow, np.asarray(images, np.float32))
    np.testing.assert_allclose(got, expected, atol=1e-5 * scale)


def dense(kernel, block, dilation):
    """A grouped kernel as one of a single group, with zeros between dilated taps."""
    per_group, features = kernel.shape[-2:]
    out = np.zeros((*kernel.shape[:2], CHANNELS, features))
    for index in range(features):
        start = index * block.groups // features * per_group
        out[:, :, start : start + per_group, index] = kernel[..., index]
    return np.asarray(reparam.algebra.dilated(out, dilation))


def trimmed(kernel, like):
    rows, columns = ((a - b) // 2 for a, b in zip(kernel.shape[:2], like.shape[:2], strict=True))
    inner = kernel[rows : rows + like.shape[0], columns : columns + like.shape[1]]
    assert np.abs(kernel).sum() == pytest.approx(np.abs(inner).sum())
    return inner


def check_leaves_and_macs(spec, block, variables):
    geometry = block.geometry(jnp.zeros((1, 8, 8, CHANNELS)))
    expected = {
        (leaf.collection, leaf.name, leaf.leaf): leaf.shape
        for leaf in reparam.leaves(spec.train, geometry)
    }
    paths, _ = jax.tree_util.tree_flatten_with_path(variables)
    assert {tuple(part.key for part in path): leaf.shape for path, leaf in paths} == expected
    if geometry.stride == 1:
        per_pixel = sum(math.prod(s) for (_, _, leaf), s in expected.items() if leaf == "kernel")
        filters = [t for t in reparam.linear.walk(spec.train) if isinstance(t, reparam.Filter)]
        per_pixel += sum(math.prod(t.kernel_size) * block.features for t in filters)
        assert reparam.macs(spec.train, geometry, 8, 8) == 64 * per_pixel


@pytest.mark.parametrize("options", DENSE, ids=str)
def test_orepa_trains_as_one_convolution(options):
    """Values, statistics and gradients are those of its branches."""
    with jax.enable_x64(True):
        block = block_of(reparam.OREPA, {**options, "activation": nn.silu, "bn_group_size": 2})
        variables = jax.tree.map(jnp.asarray, variables_of(block))
        x = jnp.asarray(random_images((4, 8, 8, CHANNELS), dtype=np.float64))

        def trained(params, form):
            y, new = block.clone(train_form=form).apply(
                {**variables, "params": params}, x, True, mutable=["batch_stats"]
            )
            return jnp.sin(y).sum(), (y, new)

        results = [
            quick_jit(jax.grad(functools.partial(trained, form=form), has_aux=True))(
                variables["params"]
            )
            for form in ("branches", "covariance")
        ]
        chex.assert_trees_all_close(*results, atol=1e-10, rtol=1e-10)


class TestInitial:
    """Blocks start as their authors'."""

    def variables(self, spec, options=None, features=CHANNELS):
        block = block_of(spec, {"features": features, **(options or {})}, jnp.float32)
        return quick_jit(block.init)(jax.random.key(0), jnp.zeros((1, 8, 8, CHANNELS)))["params"]

    def test_dbb_starts_with_an_inner_identity(self):
        params = self.variables(reparam.dbb(single_init=True), {"groups": 2})
        inner = params["conv_inner"]["kernel"][0, 0]
        np.testing.assert_array_equal(inner, np.tile(np.eye(2), 2))
        scales = [params[f"bn_{n}"]["scale"][0] for n in ("origin", "1x1", "kxk", "avg", "inner")]
        assert scales == [1, 0, 0, 0, 1]

    def test_acb_may_start_with_a_third_of_each(self):
        params = self.variables(reparam.acb(initial=1 / 3))
        assert params["bn1x3"]["scale"][0] == pytest.approx(1 / 3)

    def test_orepa_starts_with_the_authors_shares(self):
        params = self.variables(reparam.OREPA)
        names = ("origin", "avg", "prior", "kxk", "1x1", "separable")
        assert [params[f"scale_{n}"]["scale"][0] for n in names] == [0.25, 0.25, 0, 0.5, 1, 0.5]
        assert not params["conv_inner"]["kernel"].any()
        bound = (6 / (9 * CHANNELS)) ** 0.5  # Kaiming, uniform
        largest = jnp.abs(params["conv_origin"]["kernel"]).max()
        assert 0.9 * bound < largest <= bound

    def test_orepas_prior_has_other_directions_in_its_halves(self):
        prior = next(
            term
            for term in reparam.linear.walk(reparam.OREPA.train)
            if isinstance(term, reparam.Filter)
        ).kernel(4)[:, :, 0]
        np.testing.assert_allclose(
            prior[:, 0, 1], np.cos(np.pi * np.array([0.5, 1.5, 2.5]) * 2 / 3)
        )
        np.testing.assert_allclose(
            prior[0, :, 2], np.cos(np.pi * np.array([0.5, 1.5, 2.5]) * 1 / 3)
        )
        assert np.ptp(prior[0, :, 1]) == np.ptp(prior[:, 0, 2]) == 0

    def test_ecb_starts_with_small_edges_and_pytorchs_biases(self):
        params = self.variables(reparam.ecb(), features=64)
        edge = np.asarray(params["sobel_x"]["scale"])
        assert 5e-4 < edge.std() < 2e-3
        assert abs(edge.mean()) < 1e-3
        bias = np.asarray(params["conv1x1_sobel_x"]["bias"])
        assert 0.3 < np.abs(bias).max() <= CHANNELS**-0.5

    def test_fastvit_and_diracnet_start_near_the_identity(self):
        assert self.variables(reparam.fastvit())["layer_scale"]["scale"][0] == jnp.float32(1e-5)
        params = self.variables(reparam.ABLATIONS["DiracNet"])
        assert (params["alpha"]["scale"][0], params["beta"]["scale"][0]) == (1, jnp.float32(0.1))


@pytest.mark.parametrize(
    "name",
    [
        "no identity",
        "no 1x1",
        "V1",
        "V2",
        "OREPA",
        "DBB",
        "RepViT legacy",
        "ECB",
        "search",
        "FastViT",
        "DiracNet",
    ],
)
def test_unfusing_inverts_fusing(name):
    others = {
        "DBB": reparam.dbb(depthwise=True),
        "RepViT legacy": reparam.repvit(legacy=True),
        "ECB": reparam.ecb(),
        "OREPA": reparam.OREPA,
        "FastViT": reparam.fastvit(),
        "search": reparam.repopt_search(2),
        **reparam.ABLATIONS,
        **reparam.QAREPVGG_VERSIONS,
    }
    spec = others[name]
    with jax.enable_x64(True):
        block = block_of(spec, {"groups": CHANNELS} if name in ("DBB", "RepViT legacy") else {})
        like, target = variables_of(block, 1), variables_of(block)
        geometries = {"block": block.geometry(jnp.zeros((1, 8, 8, CHANNELS)))}
        options = {"blocks": (spec,), "geometries": geometries}
        like, target = ({k: {"block": v} for k, v in tree.items()} for tree in (like, target))
        deployed = fuse_params(target, **options)
        if name == "DiracNet":
            with pytest.raises(ValueError, match="no inverse"):
                reparam.unfuse_params(deployed, like=like, **options)
            return
        again = reparam.unfuse_params(deployed, like=like, **options)
        chex.assert_trees_all_close(fuse_params(again, **options), deployed, atol=1e-11)
        chex.assert_trees_all_equal_shapes(again["params"], like["params"])


@pytest.mark.core
class TestRefused:
    """What cannot be one convolution says why, in one line."""

    def test_an_activation_inside_a_branch_trains_but_has_no_deploy_form(self):
        spec = reparam.ABLATIONS["ReLU in branches"]
        block = block_of(spec, {}, jnp.float32)
        x = random_images((2, 8, 8, CHANNELS))
        variables = block.init(jax.random.key(0), x)
        y, _ = block.apply(variables, x, True, mutable=["batch_stats"])
        assert (y >= 0).all()
        assert (y > 0).any()
        for fuse in (
            lambda: fuse_model(block, variables, x),
            lambda: fuse_params(variables, blocks=(spec,)),
            lambda: block.clone(deploy=True).apply({}, x),
        ):
            with pytest.raises(ValueError, match="relu inside branch 1 of 3"):
                fuse()

    def test_squeeze_and_excite_between_a_sum_and_its_norm(self):
        inner = reparam.Sum((reparam.Conv("a", (3, 3)), reparam.Identity()))
        gate = nn.Dense(4)
        with pytest.raises(ValueError, match=r"squeeze-and-excite.*se="):
            reparam.BlockSpec("x", reparam.Chain((inner, gate, reparam.Norm("n"))))

    def test_sums_of_different_strides(self):
        terms = (reparam.Conv("a", (3, 3)), reparam.Conv("b", (1, 1), strided=False))
        block = block_of(reparam.BlockSpec("x", reparam.Sum(terms)), {"stride": 2})
        with pytest.raises(ValueError, match=r"differ.*stride 2.*stride 1"):
            block.init(jax.random.key(0), jnp.zeros((1, 8, 8, CHANNELS)))

    def test_even_filters(self):
        taps = reparam.Filter(((1.0, 0.0), (0.0, 1.0)))
        chain = reparam.Chain((reparam.Conv("a", (1, 1), strided=False), taps))
        with pytest.raises(ValueError, match=r"\(2, 2\) must be odd"):
            reparam.BlockSpec("x", chain)

    @pytest.mark.parametrize(
        "taps",
        [(1.0, 2.0), ((1.0, 2.0), (3.0,)), 1.0, "x", [[None]], [[10**400]], np.zeros((0, 3))],
    )
    def test_filters_that_are_no_rows(self, taps):
        with pytest.raises(ValueError, match=r"Filter: taps=.* must be rows"):
            reparam.Filter(taps)

    @pytest.mark.parametrize("kind", [list, np.asarray])
    def test_filters_of_lists_and_arrays(self, kind):
        rows = ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0))
        assert reparam.Filter(kind(rows)) == reparam.Filter(rows)
        assert hash(reparam.Filter(kind(rows))) == hash(reparam.Filter(rows))

    def test_groups_that_do_not_divide(self):
        block = block_of(reparam.REPCONVN, {"features": 6, "groups": 4})
        with pytest.raises(ValueError, match="4 -> 6 channels in 4 groups"):
            block.init(jax.random.key(0), jnp.zeros((1, 8, 8, CHANNELS)))

    def test_a_tree_that_fits_two_blocks(self):
        trivial, dirac = (reparam.ABLATIONS[n] for n in ("trivial", "post-addition BN"))
        same = reparam.BlockSpec(
            "same names",
            reparam.Chain(
                (
                    reparam.Sum((reparam.Conv("conv3x3", (3, 3)), reparam.AvgPool((3, 3)))),
                    reparam.Norm("bn"),
                )
            ),
        )
        variables = variables_of(block_of(trivial, {}, jnp.float32))
        with pytest.raises(ValueError, match=r"fits both trivial.*same names"):
            fuse_params({"params": {"a": variables["params"]}}, blocks=(trivial, same, dirac))

    @pytest.mark.parametrize("size", [4, 6, 31])
    def test_sizes_that_the_authors_did_not_use(self, size):
        with pytest.raises(ValueError, match=f"size={size} must be one of 5, 7"):
            reparam.dilated_reparam(size)


class TestOtherConvolutions:
    """`fuse_linear` for sequences and volumes, and for convolutions that enlarge."""

    @pytest.mark.parametrize(
        ("dims", "strides", "dilation"), [(1, 1, 2), (1, 4, 1), (3, 1, 1), (3, 2, 1)]
    )
    def test_one_and_three_axes(self, dims, strides, dilation):
        layer = nn.Conv(
            3, (3,) * dims, strides, ((dilation, dilation),) * dims, kernel_dilation=dilation
        )
        variables = quick_jit(layer.init)(jax.random.key(0), jnp.zeros((1, *(8,) * dims, 2)))
        variables = randomize(variables)
        found = fuse_linear(
            quick_jit(lambda x: layer.apply(variables, x)),
            in_channels=2,
            spatial_dims=dims,
            max_kernel=5 if dims == 1 else 3,
        )
        own = variables["params"]
        spread = np.zeros((*(2 * dilation + 1,) * dims, 2, 3), np.float32)
        spread[(slice(None, None, dilation),) * dims] = own["kernel"]
        np.testing.assert_allclose(found.kernel, spread, atol=1e-5)
        np.testing.assert_allclose(found.bias, own["bias"], atol=1e-5)

    @pytest.mark.parametrize(("size", "stride"), [(2, 2), (4, 2), (3, 3), (3, 1)])
    def test_transposed(self, size, stride):
        """The kernel, applied as documented, is the layer."""
        layer = nn.ConvTranspose(3, (size, size), (stride, stride), transpose_kernel=True)
        variables = quick_jit(layer.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
        apply = quick_jit(lambda x: layer.apply(variables, x))
        found = fuse_linear(apply, in_channels=2, max_kernel=5)
        side = found.kernel.shape[0]
        assert side <= 5
        x = random_images((1, 8, 8, 2))
        got = jax.lax.conv_general_dilated(
            x,
            found.kernel,
            (1, 1),
            ((side // 2, side // 2 + stride - 1),) * 2,
            lhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        np.testing.assert_allclose(np.asarray(got) + found.bias, apply(x), atol=1e-5)

    @pytest.mark.parametrize(
        ("function", "dims", "message"),
        [
            (lambda x: jax.nn.relu(x), 1, "not affine"),
            (lambda x: jnp.cumsum(x, axis=1), 1, "not a convolution"),
            (lambda x: x[:, :, 0], 3, r"expected .*3 axes"),
            (lambda x: jnp.repeat(x, 3, axis=1)[:, :, :5], 2, "multiple of the size"),
        ],
    )
    def test_refused(self, function, dims, message):
        with pytest.raises(ValueError, match=message):
            fuse_linear(function, in_channels=1, spatial_dims=dims, max_kernel=3)
