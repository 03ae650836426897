"""The covariance form against the three branches it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repvgg_jax import RepVGGBlock, SqueezeExcite, Variant, create_model, fuse_params
from repvgg_jax.covariance import BlockSettings, pallas_gpu
from tests.helpers.jit import quick_jit

core = pytest.mark.core

IMAGES = 8


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def relative(reference, other) -> float:
    """Largest difference over the largest value."""
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    return float(np.abs(reference - other).max() / np.abs(reference).max())


def worst(reference, other) -> float:
    """The largest of all leaves' relative differences, in trees of equal structure."""
    return max(jax.tree.leaves(jax.tree.map(relative, reference, other)))


def pair(features: int, **options) -> tuple[RepVGGBlock, RepVGGBlock]:
    """The plain block and the fast one."""
    branches, fast = (
        RepVGGBlock(features, train_form=form, **options) for form in ("branches", "covariance")
    )
    return branches, fast


def some_variables(model, x, rng):
    """Variables as NumPy arrays, every leaf random: no scale is one and no bias zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            bound = np.prod(leaf.shape[:-1]) ** -0.5
            return rng.uniform(-bound, bound, leaf.shape).astype(leaf.dtype)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def gradients(block):
    """A compiled function of variables, input and weights of the output's sum."""

    def loss(params, x, variables, weights):
        both = {**variables, "params": params}
        y, new = block.apply(both, x, train=True, mutable=["batch_stats"])
        stats = new["batch_stats"]
        # Gradients must also be right where a loss looks at the statistics.
        on_stats = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(stats))
        return jnp.sum((y * weights).astype(jnp.float32)) + 0.1 * on_stats, (y, stats)

    # What float32 loses depends on the optimizations; the others take half as long without.
    compiled = jax.jit if block.dtype == jnp.float32 else quick_jit
    return compiled(jax.grad(loss, argnums=(0, 1), has_aux=True))


def everything(block, variables, x, weights):
    """Output, new statistics, and the gradients of parameters and input."""
    grads, (y, stats) = gradients(block)(variables["params"], x, variables, weights)
    return {"y": y, "stats": stats, "params": grads[0], "x": grads[1]}


CASES = [
    pytest.param(cin, dict(features=cout, **options), id=name)
    for name, cin, cout, options in [
        ("identity", 8, 8, {}),
        ("no-identity", 8, 8, {"identity": False}),
        ("wider", 6, 8, {}),
        ("stem", 3, 8, {"stride": 2}),
        # Here features outnumber the patch: another computation, see `by_patches`.
        ("first-layer", 3, 32, {"stride": 2}),
        ("first-layer-stride-1", 2, 18, {}),
        ("first-layer-dilation", 1, 9, {"dilation": 2, "stride": 2}),
        ("first-layer-image-groups", 3, 28, {"stride": 2, "bn_group_size": 2}),
        ("first-layer-se", 3, 32, {"stride": 2, "se": SqueezeExcite(4)}),
        ("stride-groups", 8, 16, {"stride": 2, "groups": 2}),
        ("groups", 8, 8, {"groups": 4}),
        ("dilation", 8, 8, {"dilation": 2}),
        ("dilation-strided-place", 8, 8, {"dilation": 4, "identity": False}),
        ("image-groups", 8, 8, {"bn_group_size": 2}),
        ("image-and-channel-groups", 8, 8, {"bn_group_size": 4, "groups": 2}),
        ("image-groups-stride", 8, 4, {"bn_group_size": 4, "stride": 2}),
        ("se", 8, 8, {"se": SqueezeExcite(2)}),
        ("se-after-relu", 8, 8, {"se": SqueezeExcite(2, after_relu=True), "stride": 2}),
    ]
]


CORE = ("identity", "first-layer", "stride-groups", "image-groups", "se")  # quick, one of each kind


@pytest.mark.parametrize(
    ("channels", "options", "dtype", "tolerance"),
    [
        pytest.param(
            *(*case.values, "float64", 1e-12),
            id=f"{case.id}-float64",
            marks=[core] if case.id in CORE else [],
        )
        for case in CASES
    ]
    # float32 takes the same path; a few say that it is accurate enough.
    + [pytest.param(*case.values, "float32", 1e-5, id=f"{case.id}-float32") for case in CASES[::6]],
)
def test_same_values_statistics_and_gradients(channels, options, dtype, tolerance, rng):
    check_same(rng, (IMAGES, 7, 10, channels), options, dtype, tolerance)


@pytest.mark.parametrize("width", [7, 8, 11, 12])
def test_a_first_layer_takes_as_many_columns_as_divide_the_width(width, rng):
    """Statistics of 4, 4, 3 and 3 columns at once; the last one ends in padding or at a pixel."""
    check_same(rng, (4, 5, width, 3), {"features": 27, "stride": 2}, "float64", 1e-12)


def check_same(rng, shape, options, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        options = options | {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
        branches, fast = pair(**options)
        x = jnp.asarray(rng.normal(0.3, 1, shape), dtype)
        variables = some_variables(branches, x, rng)
        shape = jax.eval_shape(branches.apply, variables, x).shape
        weights = jnp.asarray(rng.normal(size=shape), dtype)
        reference = everything(branches, variables, x, weights)
        assert worst(reference, everything(fast, variables, x, weights)) <= tolerance


@pytest.fixture
def as_on_gpus(monkeypatch):
    """The arrangement of the passes that programs for GPUs get."""
    gradients.cache_clear()
    settings = functools.partial(BlockSettings, on_gpu=True)
    monkeypatch.setattr("repvgg_jax.block.BlockSettings", settings)
    yield
    gradients.cache_clear()


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize(
    ("channels", "options", "dtype", "tolerance"),
    [pytest.param(*CASES[i].values, "float64", 1e-12, id=CASES[i].id) for i in (0, 9, 13, 14)]
    + [pytest.param(*CASES[0].values, "float32", 1e-5, id="identity-float32")],
)
def test_the_arrangement_for_gpus_computes_the_same(channels, options, dtype, tolerance, rng):
    check_same(rng, (IMAGES, 7, 10, channels), options, dtype, tolerance)


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        pytest.param(*CASES[0].values, id=CASES[0].id, marks=core),
        pytest.param(*CASES[2].values, id=CASES[2].id),
    ],
)
def test_with_the_kernel_for_gpus_the_same(channels, options, rng, monkeypatch):
    calls = []

    def interpreted(*args):
        calls.append(args)
        return pallas_gpu.one_pass(*args, interpret=True)

    monkeypatch.setattr(pallas_gpu, "input_gradient", interpreted)
    monkeypatch.setattr(pallas_gpu, "serves", lambda settings, x, y: True)
    check_same(rng, (IMAGES, 7, 10, channels), options, "float64", 1e-12)
    assert calls


@core
def test_variables_and_evaluation_are_the_same(rng):
    branches, fast = pair(8)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 8)), jnp.float32)
    variables = quick_jit(branches.init)(jax.random.key(3), x)
    for train in (False, True):
        other = quick_jit(fast.init, static_argnums=2)(jax.random.key(3), x, train)
        jax.tree.map(np.testing.assert_array_equal, variables, other)
    np.testing.assert_array_equal(branches.apply(variables, x), fast.apply(variables, x))


@pytest.mark.slow
@pytest.mark.parametrize("on_gpus", [False, True])
def test_bfloat16_is_no_further_from_the_truth(on_gpus, rng, request):
    """Three blocks: the error against float64 is at most 1.5 times the plain form's."""
    if on_gpus:
        request.getfixturevalue("as_on_gpus")
    variant = Variant("three", (2,), (16,), 16, strides=(1,), stem_stride=1)
    model = create_model(variant, num_classes=10)
    x = rng.normal(size=(16, 12, 12, 3)).astype(np.float32)
    weights = rng.normal(size=(16, 10)).astype(np.float32)

    def square_errors(form, dtype, param_dtype, variables, truth=None):
        net = model.clone(train_form=form, dtype=dtype, param_dtype=param_dtype)
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), variables)
        result = everything(net, variables, jnp.asarray(x, param_dtype), weights)
        result = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), result)
        if truth is None:
            return result
        part = jax.tree.map(
            lambda t, r: np.square(r - t).mean() / np.square(t).mean(), truth, result
        )
        return {what: np.mean(jax.tree.leaves(leaves)) for what, leaves in part.items()}

    # Rounding errors are noise: one draw of the variables says little, four say enough.
    totals = {"branches": dict.fromkeys(("y", "stats", "params", "x"), 0.0)}
    totals["covariance"] = dict(totals["branches"])
    for _ in range(4):
        variables = some_variables(model, x, rng)
        with jax.enable_x64(True):
            truth = square_errors("branches", jnp.float64, jnp.float64, variables)
        for form, total in totals.items():
            errors = square_errors(form, jnp.bfloat16, jnp.float32, variables, truth)
            for what, error in errors.items():
                total[what] += error
    for what, plain in totals["branches"].items():
        assert 0 < np.sqrt(totals["covariance"][what]) <= 1.5 * np.sqrt(plain), what


@pytest.mark.parametrize("ratio", [10, pytest.param(100, marks=core), 1000])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        pytest.param(8, {"features": 8}, id="identity"),
        pytest.param(8, {"features": 8, "identity": False}, id="no-identity"),
        pytest.param(3, {"features": 32, "stride": 2}, id="first-layer"),
    ],
)
def test_means_far_from_zero(ratio, channels, options, rng):
    """Channel means up to 1000 deviations away: variances keep three digits in float32."""
    branches, fast = pair(**options)
    deviations = rng.uniform(0.1, 10, channels)
    signs = rng.choice([-1, 1], channels)
    x = deviations * (rng.normal(size=(IMAGES, 16, 16, channels)) + ratio * signs)
    x = np.asarray(x, np.float32)
    variables = some_variables(branches, x, rng)

    def variances(block, variables, x, compiled=jax.jit):
        _, new = compiled(lambda v, x: block.apply(v, x, train=True, mutable=["batch_stats"]))(
            variables, x
        )
        stats = new["batch_stats"]
        old = variables["batch_stats"]
        return {n: np.asarray(stats[n]["var"]) - 0.9 * old[n]["var"] for n in stats}

    found = variances(fast, variables, x)
    with jax.enable_x64(True):
        exact = branches.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        truth = variances(exact, wide, x.astype(np.float64), quick_jit)
    for norm, var in truth.items():
        assert (np.abs(found[norm] - var) <= 1e-3 * var).all(), norm


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("ratio", [10, 30, 100, 1000])
def test_means_far_from_zero_in_bfloat16_on_gpus(ratio, rng):
    """Without a shift, errors of variances are at most three times the plain form's.

    At 1000 deviations the input's rounding is larger than the variance in both.
    """
    branches, fast = pair(8, dtype=jnp.bfloat16)
    deviations = rng.uniform(0.1, 10, 8)
    x = deviations * (rng.normal(size=(IMAGES, 16, 16, 8)) + ratio * rng.choice([-1, 1], 8))
    variables = some_variables(branches, x.astype(np.float32), rng)

    def variance(block, variables, x):
        apply = quick_jit(lambda v, x: block.apply(v, x, train=True, mutable=["batch_stats"]))
        _, new = apply(variables, x)
        old = variables["batch_stats"]["bn_identity"]["var"]
        return np.asarray(new["batch_stats"]["bn_identity"]["var"], np.float64) - 0.9 * old

    with jax.enable_x64(True):
        exact = branches.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        truth = variance(exact, jax.tree.map(lambda leaf: leaf.astype(np.float64), variables), x)
    plain, found = (
        np.sqrt(
            np.mean(np.square(variance(block, variables, jnp.asarray(x, jnp.bfloat16)) / truth - 1))
        )
        for block in (branches, fast)
    )
    assert found <= 3 * plain


@core
def test_variances_never_go_below_zero(rng):
    """Channels that are constant, or exact copies of one another that the 1x1 kernel cancels."""
    _, fast = pair(8)
    x = np.repeat(rng.normal(500, 1, (IMAGES, 6, 6, 4)), 2, axis=-1).astype(np.float32)
    x[..., :2] = 1e4 / 3
    variables = some_variables(fast, x, rng)
    for stats in variables["batch_stats"].values():
        stats["var"] = np.ones_like(stats["var"])
    kernel = np.array(variables["params"]["conv1x1"]["kernel"])
    kernel[:, :, 1::2] = -kernel[:, :, 0::2]
    variables["params"]["conv1x1"]["kernel"] = kernel
    y, new = jax.jit(lambda v, x: fast.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    assert np.isfinite(y).all()
    for stats in new["batch_stats"].values():
        # 0.9 of the initial 1 plus a tenth of the batch's.
        assert (stats["var"] >= np.float32(0.9)).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bn_group_size", [None, pytest.param(2, marks=core)])
def test_sharded_over_eight_devices(bn_group_size, rng):
    """Plain jit with the batch sharded computes what one device does."""
    _, fast = pair(
        8, bn_group_size=bn_group_size, groups=2, dtype=jnp.float64, param_dtype=jnp.float64
    )
    x = rng.normal(0.5, 1, (16, 6, 6, 8))
    variables = some_variables(fast, x, rng)
    weights = rng.normal(size=(16, 6, 6, 8))
    reference = everything(fast, variables, x, weights)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    sharded = everything(
        fast,
        jax.device_put(variables, whole),
        jax.device_put(x, split),
        jax.device_put(weights, split),
    )
    assert len(sharded["x"].sharding.device_set) == 8
    assert worst(reference, sharded) <= 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_whole_network_trains_the_same(remat, rng):
    """Ten steps of gradient descent in float64: the same losses, and the result fuses."""
    variant = Variant("tiny", (2,), (8,), 8, groups=2)
    x = jnp.asarray(rng.normal(size=(16, 12, 12, 3)))
    labels = jnp.asarray(rng.integers(0, 4, 16))
    losses = {}
    for form in ("branches", "covariance"):
        model = create_model(
            variant,
            num_classes=4,
            train_form=form,
            remat=remat,
            dtype=jnp.float64,
            param_dtype=jnp.float64,
        )
        variables = quick_jit(model.init)(jax.random.key(0), x)

        @quick_jit
        def step(variables, model=model):
            def loss_of(params):
                logits, new = model.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
                picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
                return -picked.mean(), new["batch_stats"]

            (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
            return {"params": params, "batch_stats": stats}, loss

        losses[form] = []
        for _ in range(10):
            variables, loss = step(variables)
            losses[form].append(float(loss))
    assert losses["covariance"][-1] < 0.7 * losses["covariance"][0]
    np.testing.assert_allclose(losses["covariance"], losses["branches"], rtol=1e-10)

    deployed = model.clone(deploy=True)
    np.testing.assert_allclose(
        quick_jit(deployed.apply)(fuse_params(jax.device_get(variables)), x),
        quick_jit(model.apply)(variables, x),
        atol=1e-10,
    )


@core
def test_batch_that_the_groups_do_not_divide(rng):
    _, fast = pair(8, bn_group_size=3)
    x = jnp.asarray(rng.normal(size=(8, 5, 5, 8)), jnp.float32)
    variables = some_variables(fast, x, rng)
    with pytest.raises(ValueError, match="groups of 3 images do not divide a batch of 8"):
        fast.apply(variables, x, train=True, mutable=["batch_stats"])


@core
def test_one_value_per_channel(rng):
    _, fast = pair(8)
    x = jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32)
    variables = some_variables(fast, x, rng)
    with pytest.raises(ValueError, match="more than one value per channel"):
        fast.apply(variables, x, train=True, mutable=["batch_stats"])


@core
def test_unknown_train_form():
    with pytest.raises(ValueError, match=r"covarianz.*branches.*covariance"):
        create_model("A0", train_form="covarianz")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A0", "B1g4", "D2se"])
def test_official_variants_trace(name):
    """Shapes and dtypes fit, forward and backward, without computing anything."""
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    model = create_model(name, train_form="covariance", bn_group_size=1)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params, variables, images):
        both = {**variables, "params": params}
        logits, new = model.apply(both, images, train=True, mutable=["batch_stats"])
        return logits.sum(), new["batch_stats"]

    grads, stats = jax.eval_shape(
        jax.grad(loss, has_aux=True), variables["params"], variables, images
    )

    def like(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert like(grads) == like(variables["params"])
    assert like(stats) == like(variables["batch_stats"])
