import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import Variant, cpu_measured, create_model
from repvgg_jax.block import RepVGGBlock
from repvgg_jax.cpu_conv import (
    conv_general_dilated,
    measured_conv_general_dilated,
    training_conv_general_dilated,
)
from tests.helpers.jit import quick_jit
from tests.helpers.trees import random_images


def operands(channels, features, groups, height, width):
    """Positive pixels, as after a ReLU, and a kernel that keeps their scale."""
    x = np.maximum(random_images((2, height, width, channels)), 0)
    fan_in = 9 * channels // groups
    kernel = random_images((3, 3, channels // groups, features), seed=1) * (2 / fan_in) ** 0.5
    return x, kernel.astype(np.float32)


def convolve(function, x, kernel, stride, groups, dilation=1):
    pad = kernel.shape[0] // 2 * dilation
    return function(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize(
    ("channels", "features", "groups", "stride", "height", "width"),
    [
        (48, 48, 1, 1, 14, 17),  # Winograd, with an odd side
        (64, 96, 2, 1, 15, 14),  # Winograd for each group
        (64, 64, 2, 1, 30, 30),  # a convolution for each group
        (16, 16, 4, 1, 6, 6),
        (64, 64, 2, 2, 7, 6),
        (48, 40, 1, 2, 15, 14),  # patches
    ],
)
def test_substitutes_are_the_convolution_and_as_exact(
    channels, features, groups, stride, height, width
):
    x, kernel = operands(channels, features, groups, height, width)
    shape = (stride, groups)
    fast = jax.jit(lambda x, k: convolve(conv_general_dilated, x, k, *shape))
    plain = jax.jit(lambda x, k: convolve(jax.lax.conv_general_dilated, x, k, *shape))
    assert "platform_index" in str(jax.make_jaxpr(fast)(x, kernel))
    with jax.enable_x64(True):
        truth = convolve(jax.lax.conv_general_dilated, np.float64(x), np.float64(kernel), *shape)
    errors = [
        float(np.sqrt(np.square(f(x, kernel) - np.asarray(truth)).mean())) for f in (fast, plain)
    ]
    assert errors[0] <= 4 * errors[1]
    assert errors[1] < 1e-6


@pytest.mark.parametrize(("dilation", "height", "width"), [(2, 18, 21), (4, 33, 36)])
def test_dilated_convolutions_are_as_exact(dilation, height, width):
    x, kernel = operands(32, 40, 1, height, width)

    shape = (1, 1, dilation)
    fast = jax.jit(lambda x, k: convolve(conv_general_dilated, x, k, *shape))
    assert "platform_index" in str(jax.make_jaxpr(fast)(x, kernel))
    with jax.enable_x64(True):
        truth = convolve(jax.lax.conv_general_dilated, np.float64(x), np.float64(kernel), *shape)
    np.testing.assert_allclose(fast(x, kernel), truth, rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("channels", "groups", "size", "padding", "options"),
    [
        (4, 4, 3, "SAME", {}),  # as nn.Conv has it by default
        (4, 4, 5, ((0, 0), (0, 0)), {}),  # larger than the image: no outputs
        (4, 4, 3, ((-1, 1), (0, 0)), {}),
        (4, 4, 3, ((1, 1), (1, 1)), {"lhs_dilation": (2, 2)}),
        (64, 1, 3, ((1, 1), (1, 1)), {"lhs_dilation": (1, 4)}),
        (4, 1, 1, ((0, 0), (0, 0)), {"lhs_dilation": (2, 2)}),
    ],
)
def test_what_blocks_do_not_have_stays_plain(channels, groups, size, padding, options):
    x = np.ones((1, 4, 15, channels), np.float32)
    kernel = np.ones((size, size, channels // groups, channels), np.float32)
    options |= {"rhs_dilation": (1, 1), "feature_group_count": groups}
    options |= {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    programs = [
        jax.make_jaxpr(lambda x, k, f=f: f(x, k, (1, 1), padding, **options))(x, kernel)
        for f in (conv_general_dilated, jax.lax.conv_general_dilated)
    ]
    assert str(programs[0]) == str(programs[1])


@pytest.mark.parametrize(("pad", "fast"), [(1, True), (0, False)])
def test_symbolic_sizes_without_padding_stay_plain(pad, fast):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, h, w, 4"), np.float32)
    kernel = np.ones((3, 3, 1, 4), np.float32)
    options = {"rhs_dilation": (1, 1), "feature_group_count": 4}
    options["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
    padding = ((pad, pad), (pad, pad))
    program = jax.make_jaxpr(lambda x: conv_general_dilated(x, kernel, (1, 1), padding, **options))(
        x
    )
    assert ("platform_index" in str(program)) == fast


def test_derivatives():
    x, kernel = operands(48, 48, 1, 14, 14)

    def gradients(function):
        return jax.jit(jax.grad(lambda x, k: jnp.sin(convolve(function, x, k, 1, 1)).sum(), (0, 1)))

    found = gradients(conv_general_dilated)(x, kernel)
    with jax.enable_x64(True):
        truth = gradients(jax.lax.conv_general_dilated)(np.float64(x), np.float64(kernel))
    for a, exact in zip(found, truth, strict=True):
        assert np.abs(a - np.asarray(exact)).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("function", "size", "channels", "features", "stride", "height", "width"),
    [
        # Winograd, with an odd side
        (training_conv_general_dilated, 3, 48, 40, 1, 14, 17),
        # patches
        (training_conv_general_dilated, 3, 3, 40, 2, 17, 14),
        (training_conv_general_dilated, 3, 48, 40, 2, 14, 15),
        # matrix products
        (training_conv_general_dilated, 1, 48, 40, 1, 5, 4),
        (training_conv_general_dilated, 1, 48, 40, 2, 5, 4),
        (conv_general_dilated, 1, 24, 40, 2, 5, 4),
    ],
)
def test_substitutes_and_their_gradients_are_as_exact(
    function, size, channels, features, stride, height, width
):
    x, kernel = operands(channels, features, 1, height, width)
    kernel = kernel[:size, :size]
    out = (2, -(-height // stride), -(-width // stride), features)
    dy = random_images(out, seed=2)

    def all_of(function):
        def compute(x, kernel, dy):
            y, pull = jax.vjp(lambda x, k: convolve(function, x, k, stride, 1), x, kernel)
            return y, *pull(dy)

        return jax.jit(compute)

    fast, plain = all_of(function), all_of(jax.lax.conv_general_dilated)
    assert "platform_index" in str(jax.make_jaxpr(fast)(x, kernel, dy))
    with jax.enable_x64(True):
        truth = plain(np.float64(x), np.float64(kernel), np.float64(dy))
    for a, b, exact in zip(fast(x, kernel, dy), plain(x, kernel, dy), truth, strict=True):
        errors = [float(np.sqrt(np.square(part - np.asarray(exact)).mean())) for part in (a, b)]
        assert errors[0] <= 4 * errors[1]
        assert errors[1] <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("function", [conv_general_dilated, training_conv_general_dilated])
@pytest.mark.parametrize(
    ("size", "stride", "dilation", "height", "width"),
    [
        (3, 1, 1, 5, 4),
        (3, 2, 1, 7, 6),
        (5, 2, 3, 9, 14),
        (9, 1, 1, 6, 11),  # row by row
        (9, 2, 2, 8, 5),
    ],
)
def test_depthwise_convolutions_and_their_gradients_are_as_exact(
    function, size, stride, dilation, height, width
):
    x = random_images((2, height, width, 6))
    kernel = random_images((size, size, 1, 6), seed=1)
    dy = random_images((2, -(-height // stride), -(-width // stride), 6), seed=2)

    def all_of(function):
        def compute(x, kernel, dy):
            y, pull = jax.vjp(lambda x, k: convolve(function, x, k, stride, 6, dilation), x, kernel)
            return y, *pull(dy)

        return compute

    fast, plain = all_of(function), quick_jit(all_of(jax.lax.conv_general_dilated))
    assert "platform_index" in str(jax.make_jaxpr(fast)(x, kernel, dy))
    fast = quick_jit(fast)
    with jax.enable_x64(True):
        wide = np.float64(x), np.float64(kernel), np.float64(dy)
        truth, double = plain(*wide), fast(*wide)
    for a, b, exact in zip(double, fast(x, kernel, dy), truth, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, exact, rtol=0, atol=1e-13 * np.abs(exact).max())
        np.testing.assert_allclose(b, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize(("groups", "side"), [(2, 14), (1, 12)])
def test_training_with_groups_or_small_images_stays_plain(groups, side):
    x, kernel = operands(64, 64, groups, side, side)
    for stride in (1, 2):
        jaxpr = jax.make_jaxpr(
            lambda x, k, s=stride: convolve(training_conv_general_dilated, x, k, s, groups)
        )(x, kernel)
        assert "platform_index" not in str(jaxpr)


def test_a_training_block_has_the_same_directional_derivative():
    x = random_images((2, 14, 14, 48))
    blocks = [RepVGGBlock(48, lowering=lowering) for lowering in ("auto", "plain")]
    variables = quick_jit(blocks[0].init)(jax.random.key(0), x)
    direction = random_images(x.shape, seed=1)

    def derivative(block):
        def train(x):
            return block.apply(variables, x, train=True, mutable=["batch_stats"])

        return quick_jit(lambda x, direction: jax.jvp(train, (x,), (direction,)))(x, direction)

    fast, plain = map(derivative, blocks)
    for a, b in zip(*map(jax.tree.leaves, (fast, plain)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def lowered(lowering, platform, deploy):
    block = RepVGGBlock(48, deploy=deploy, lowering=lowering)
    x = jax.ShapeDtypeStruct((1, 14, 14, 48), jnp.float32)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    return jax.jit(block.apply).trace(variables, x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("deploy", "convolutions"), [(True, 1), (False, 2)])
def test_only_cpus_get_substitutes_and_only_if_wanted(deploy, convolutions):
    assert "stablehlo.convolution" not in lowered("auto", "cpu", deploy)
    for lowering, platform in (("auto", "tpu"), ("auto", "cuda"), ("plain", "cpu")):
        text = lowered(lowering, platform, deploy)
        assert text.count("stablehlo.convolution") == convolutions
        assert "dot_general" not in text


@pytest.mark.parametrize("change", [{"dtype": jnp.bfloat16}, {"dilation": 2}])
def test_others_stay_plain(change):
    block = RepVGGBlock(48, **{"deploy": True, **change})
    x = jax.ShapeDtypeStruct((1, 14, 14, 48), jnp.float32)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    assert "platform_index" not in str(jax.make_jaxpr(block.apply)(variables, x))


def test_unknown_lowering():
    with pytest.raises(
        ValueError, match="lowering='fast' must be one of 'auto', 'measured', 'plain'"
    ):
        create_model("A0", lowering="fast")


def test_a_kernel_that_is_a_constant_is_transformed_once():
    """When the program is compiled; as an argument it is transformed whenever it runs."""
    x, kernel = operands(48, 40, 1, 14, 14)
    argument = jax.jit(lambda x, k: convolve(conv_general_dilated, x, k, 1, 1)).lower(x, kernel)
    constant = jax.jit(lambda x: convolve(conv_general_dilated, x, kernel, 1, 1)).lower(x)
    argument, constant = argument.compile(), constant.compile()
    np.testing.assert_allclose(constant(x), argument(x, kernel), rtol=0, atol=1e-5)
    saved = argument.cost_analysis()["flops"] - constant.cost_analysis()["flops"]
    assert saved >= 2 * kernel.size


@pytest.mark.parametrize(
    ("groups", "per_group", "substituted"), [(2, 8, True), (64, 2, True), (128, 2, False)]
)
def test_many_groups_stay_one_convolution(groups, per_group, substituted):
    x, kernel = operands(groups * per_group, groups * per_group, groups, 6, 6)
    jaxpr = jax.make_jaxpr(lambda x, k: convolve(conv_general_dilated, x, k, 1, groups))(x, kernel)
    assert ("platform_index" in str(jaxpr)) is substituted


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("function", [conv_general_dilated, training_conv_general_dilated])
def test_a_batch_may_be_empty(function, groups, stride):
    x, kernel = operands(64, 96, groups, 14, 14)
    result = convolve(function, x[:0], kernel, stride, groups)
    assert result.shape == (0, 14 // stride, 14 // stride, 96)


def test_training_needs_images():
    block = RepVGGBlock(48)
    variables = jax.eval_shape(block.init, jax.random.key(0), np.zeros((1, 14, 14, 48), np.float32))
    empty = np.zeros((0, 14, 14, 48), np.float32)
    assert jax.eval_shape(block.apply, variables, empty).shape == empty.shape
    with pytest.raises(ValueError, match=r"without images, \(0, 14, 14, 48\)"):
        jax.eval_shape(
            lambda v: block.apply(v, empty, train=True, mutable=["batch_stats"]), variables
        )


# Timed on this machine.


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Measured choices, with times of one's own instead of the machine's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_measured, "_memory", {})
    asked = []

    def times(candidates, shapes):
        asked.append(shapes)
        return {name: took[name] for name in candidates}

    took = dict.fromkeys(("plain", "patches", "winograd", "convolution", "usual"), 1.0)
    monkeypatch.setattr(cpu_measured, "times", times)
    return took, asked, tmp_path / "repvgg_jax" / "convolutions.json"


def primitives(shape, kernel, groups=1, stride=1):
    """Names in the program of a measured convolution, traced anew."""
    x, k = jnp.zeros(shape), jnp.zeros(kernel)
    return str(
        jax.make_jaxpr(lambda x: convolve(measured_conv_general_dilated, x, k, stride, groups))(x)
    )


@pytest.mark.parametrize(
    ("fastest", "inside"),
    [
        ("plain", None),
        ("patches", "concatenate"),
        ("winograd", "transpose"),
        ("usual", "transpose"),
    ],
)
def test_the_fastest_is_taken_and_remembered(timed, fastest, inside):
    took, asked, path = timed
    took[fastest] = 0.5
    shapes = (1, 14, 14, 32), (3, 3, 32, 40)
    for _ in range(2):
        program = primitives(*shapes)
        assert ("platform_index" in program) == (inside is not None)
        if inside:
            assert inside in program
    assert asked == [shapes]
    (table,) = json.loads(path.read_text()).values()
    assert list(table.values()) == [fastest]


def test_what_is_as_fast_changes_nothing(timed):
    """Up to a tenth is noise; Winograd is what the table says here."""
    took, _, path = timed
    took["plain"] = 0.91
    assert "transpose" in primitives((1, 14, 14, 32), (3, 3, 32, 32))
    took["plain"] = 0.89
    for damage in ('{"half of a', "[" * 10**5, "7"):  # measured again
        path.write_text(damage)
        assert "platform_index" not in primitives((1, 14, 14, 32), (3, 3, 32, 32))


def test_a_user_without_a_home(timed, monkeypatch):
    _, asked, _ = timed

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    for _ in range(2):
        primitives((1, 14, 14, 32), (3, 3, 32, 40))
    assert len(asked) == 1


def test_other_machines_and_shapes_are_measured_apart(timed, monkeypatch):
    _, asked, _ = timed
    primitives((1, 14, 14, 32), (3, 3, 32, 32))
    primitives((8, 14, 14, 32), (3, 3, 32, 32))
    primitives((8, 14, 14, 64), (3, 3, 32, 32), groups=2)
    assert len(asked) == 3
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2")
    primitives((1, 14, 14, 32), (3, 3, 32, 32))
    assert len(asked) == 4
    primitives((1, 14, 14, 4), (3, 3, 4, 32))  # too few channels: no choice
    primitives((0, 14, 14, 32), (3, 3, 32, 32))
    assert len(asked) == 4


def test_timing_inside_a_trace(monkeypatch, tmp_path):
    """A network is measured while it is traced, and computes the same; the disk may be full."""
    monkeypatch.setattr(cpu_measured, "_memory", {})
    place = tmp_path / "file"
    place.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    x, kernel = operands(32, 32, 1, 8, 8)
    measured = jax.jit(lambda x, k: convolve(measured_conv_general_dilated, x, k, 1, 1))
    plain = convolve(jax.lax.conv_general_dilated, x, kernel, 1, 1)
    np.testing.assert_allclose(measured(x, kernel), plain, atol=1e-5)
    (table,) = cpu_measured._memory.values()
    assert list(table) == ["2x8x8x32 to 32, stride 1, 1 groups"]


def test_a_network_takes_the_measured_lowering(timed):
    _, asked, _ = timed
    model = create_model(Variant("small", (2,), (32,), 32), deploy=True, lowering="measured")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    asked.clear()
    jax.eval_shape(model.apply, variables, jnp.zeros((4, 64, 64, 3)))
    assert asked == [((4, 32, 32, 32), (3, 3, 32, 32)), ((4, 16, 16, 32), (3, 3, 32, 32))]
    with pytest.raises(ValueError, match="'measured'"):
        create_model("A0", lowering="fastest")
