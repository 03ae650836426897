"""Quantization after training: ranges, grids, and the simulation against integer arithmetic."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import SqueezeExcite, Variant, create_model, create_segmenter, quantization
from repvgg_jax.quantization import CALIBRATORS, TARGETS, Grid, Settings, chain, chains, quantize
from repvgg_jax.quantization.calibrators import Histogram, choose_range
from repvgg_jax.quantization.network import plan
from repvgg_jax.quantization.quantize import observe
from repvgg_jax.segmentation.resnet import ResNetVariant
from tests.helpers.trees import random_images, random_variables

TINY = Variant("tiny", (1, 1), (8, 8), 8, strides=(2, 1))


@functools.cache
def deployed(variant=TINY, activation=nn.relu):
    model = create_model(variant, num_classes=5, activation=activation)
    return model.clone(deploy=True), model.fuse(random_variables(model, size=8, seed=1))


@functools.cache
def images():
    return random_images((24, 8, 8, 3), seed=2)


def ranged(values, calibrator, *, symmetric=False, percentile=99.9):
    return choose_range(
        "stem", Histogram.of(values), calibrator, symmetric=symmetric, percentile=percentile
    )


@pytest.mark.core
class TestCalibrators:
    """Histograms to ranges."""

    def values(self, relu=False):
        values = np.random.default_rng(0).standard_normal(100_000)
        values = np.append(values, [40.0])  # one outlier
        return np.maximum(values, 0) if relu else values

    def test_max_is_all_of_it(self):
        assert ranged(self.values(), "max")[1] == 40
        assert ranged(self.values(relu=True), "max") == (0, 40)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_percentile_is_a_quantile(self, symmetric):
        values = self.values()
        low, high = ranged(values, "percentile", symmetric=symmetric)
        bin_width = (values.max() - values.min()) / 2048
        expected = np.quantile(np.abs(values) if symmetric else values, 0.999)
        assert high == pytest.approx(expected, abs=2 * bin_width)
        assert low == pytest.approx(
            -expected if symmetric else np.quantile(values, 0.001), abs=2 * bin_width
        )

    def test_percentile_counts_exact_zeros(self):
        values = np.concatenate([np.zeros(900), np.linspace(1, 100, 100)])
        assert ranged(values, "percentile", percentile=95)[1] == pytest.approx(50.5, abs=1)

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_mse_is_the_least_error_that_can_be_measured(self, relu, symmetric):
        values, target = self.values(relu), TARGETS["tensorrt" if symmetric else "vnni"]

        def error(low, high):
            grid = Grid.of_range(low, high, target)
            return np.mean((grid(values.astype(np.float32)) - values) ** 2)

        found = ranged(values, "mse", symmetric=symmetric)
        assert 3 < found[1] < 40  # the outlier is cut
        best = min(error(-bound if not relu else 0, bound) for bound in np.linspace(2, 40, 60))
        assert error(*found) <= 1.03 * best
        assert error(*found) < 0.95 * error(*ranged(values, "max", symmetric=symmetric))

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_entropy_cuts_an_outlier(self, symmetric):
        low, high = ranged(self.values(), "entropy", symmetric=symmetric)
        assert 2 < high < 20
        assert -20 < low < -2

    @pytest.mark.parametrize("calibrator", CALIBRATORS)
    def test_ranges_lie_within_the_values(self, calibrator):
        values = np.random.default_rng(1).exponential(size=10_000)
        low, high = ranged(values, calibrator)
        assert low == 0
        assert 0 < high <= values.max()

    def test_empty_and_infinite_ranges(self):
        with pytest.raises(ValueError, match="0 for all calibration images"):
            ranged(np.zeros(10), "max")
        histogram = Histogram(-1, np.inf, np.ones(4))
        with pytest.raises(ValueError, match=r"stage1_block0.*finite"):
            choose_range("stage1_block0", histogram, "mse", symmetric=False, percentile=99)


@pytest.mark.core
class TestGrid:
    """Numbers and what they stand for."""

    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    @pytest.mark.parametrize("low", [0.0, -0.7, -3.0])
    def test_zero_is_exact_and_steps_are_even(self, target, low):
        grid = Grid.of_range(low, 2.0, target)
        values = np.linspace(low, 2.0, 1001, dtype=np.float32)
        found = grid(values)
        assert np.all(np.abs(found - values) <= 1.001 * grid.scale)
        assert np.abs(found - values)[10:-10].max() <= 0.5001 * grid.scale
        assert grid(np.zeros(1, np.float32))[0] == 0
        numbers = grid.numbers(values)
        assert numbers.min() >= target.lowest
        assert numbers.max() <= target.highest
        # At a tie, division may round either way.
        assert np.mean(np.asarray(grid(jnp.asarray(values))) == found) > 0.98

    def test_halves_go_to_even(self):
        grid = Grid(np.float32(1), 0, -128, 127)
        found = grid(np.array([0.5, 1.5, 2.5, -0.5, 200], np.float32))
        assert found.tolist() == [0, 2, 2, 0, 127]

    def test_weights_per_channel_and_biases_that_fit_int32(self):
        kernel = np.array([[1.0, 1e-9, 0], [-0.5, 0, 0]], np.float32)
        bias = np.array([1.0, 5.0, 3.0], np.float32)
        activation = Grid.of_range(0, 1, TARGETS["vnni"])
        grid = Grid.of_weights(kernel, bias, activation)
        assert grid.scale[0] == np.float32(1 / 127)
        assert np.abs(bias / (activation.scale * grid.scale)).max() < 2**31
        np.testing.assert_allclose(grid(kernel)[:, 0], kernel[:, 0], atol=0.5 / 127)


@pytest.mark.core
class TestPlan:
    """Which tensors are quantized."""

    def test_outputs_are_quantized_where_no_layer_follows(self):
        model, _ = deployed()
        found = plan(model)
        assert found.layers == (
            "stem/reparam",
            "stage1_block0/reparam",
            "stage2_block0/reparam",
            "head",
        )
        assert (found.inputs, found.outputs) == (found.layers, ("stage2_block0",))

    def test_float_layers(self):
        model, _ = deployed()
        found = plan(model, ("stem", "stage2*"))
        assert found.layers == ("stage1_block0/reparam", "head")
        assert found.outputs == ("stage1_block0",)
        with pytest.raises(ValueError, match="float-layers=stage9"):
            plan(model, ("stage9",))
        with pytest.raises(ValueError, match="nothing to quantize"):
            plan(model, ("*",))

    def test_segmenters(self):
        variant = Variant("tiny", (1, 2), (4, 6), 4, strides=(2, 2))
        model = create_segmenter(variant, 5, output_stride=4, bins=(1, 3), width=8, deploy=True)
        blocks = ("stem", "stage1_block0", "stage2_block0", "stage2_block1")
        backbone, pyramid = tuple(f"backbone/{name}" for name in blocks), ("pyramid1", "pyramid3")
        assert chains(model) == (backbone, ("decoder", "head"))
        found = plan(model, ("backbone/stem/reparam", "decoder"))
        assert found.layers == (*(f"{name}/reparam" for name in (*backbone[1:], *pyramid)), "head")
        assert found.inputs == found.layers
        assert found.outputs == (backbone[-1], *pyramid)  # what is pooled, resized or joined
        assert found.float_layers == ("backbone/stem", "decoder")
        with pytest.raises(ValueError, match="2 chains"):
            chain(model)

        model = create_segmenter(ResNetVariant("tiny", (1, 2), (2, 2), (4, 4, 6)), 5, deploy=True)
        first = "backbone/stage1_block0"
        assert chains(model)[1] == tuple(f"{first}/conv{i}" for i in range(3))
        # What is added.
        assert {f"{first}/conv2", f"{first}/shortcut"} <= set(plan(model).outputs)

    def test_gates_and_other_activations(self):
        gated = create_model(
            dataclasses.replace(TINY, se=SqueezeExcite(4, after_relu=True)), deploy=True
        )
        assert "stage1_block0/se" in plan(gated).inputs
        before = create_model(dataclasses.replace(TINY, se=SqueezeExcite(4)), deploy=True)
        assert "stage1_block0/reparam" in plan(before).outputs
        silu = create_model(TINY, activation=nn.silu, deploy=True)
        assert set(plan(silu).outputs) == set(plan(silu).layers) - {"head"}


@pytest.mark.parametrize(
    "target", [t if t != "vnni" else pytest.param(t, marks=pytest.mark.core) for t in TARGETS]
)
def test_the_simulation_is_integer_arithmetic(target):
    model, fused = deployed()
    found = quantize(model, fused, images(), Settings(target=target))
    x = np.asarray(found.activations["stem/reparam"].numbers(images()), np.int32)
    order = (*found.plan.layers[1:-1], "stage2_block0/output")
    for layer, name, after in zip(model.layers, found.plan.layers, order, strict=False):
        into, out, weights = found.activations[name], found.activations[after], found.weights[name]
        params = found.params[layer.name]["reparam"]
        kernel = np.asarray(weights.numbers(params["kernel"]), np.int32)
        bias = np.round(params["bias"].astype(np.float64) / found.bias_scale(name)).astype(np.int32)
        assert np.abs(kernel).max() == 127
        total = jax.lax.conv_general_dilated(
            x - into.zero_point,
            kernel,
            (layer.stride,) * 2,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        real = (np.asarray(total, np.float64) + bias) * found.bias_scale(name)
        x = np.clip(
            np.round(np.maximum(real, 0) / out.scale) + out.zero_point, out.lowest, out.highest
        ).astype(np.int32)
    pooled = ((x - out.zero_point) * out.scale).mean((1, 2)).astype(np.float32)
    head = found.variables["params"]["head"]
    logits = found.activations["head"](pooled) @ head["kernel"] + head["bias"]
    simulated = found(images())
    # Sums that lie between two numbers to within float32 may round to either.
    close = np.abs(simulated - logits) <= 1e-4 * np.abs(logits).max()
    assert close.mean() > 0.95
    assert np.abs(simulated - logits).max() <= 0.05 * np.abs(logits).max()


class TestQuantize:
    """The whole."""

    @pytest.mark.parametrize(
        ("variant", "activation"),
        [
            pytest.param(TINY, nn.relu, id="plain"),
            pytest.param(
                Variant("se", (1, 1), (8, 8), 8, se=SqueezeExcite(4), groups=2),
                nn.relu,
                id="gated",
                marks=pytest.mark.slow,
            ),
            pytest.param(TINY, nn.silu, id="silu", marks=pytest.mark.slow),
            pytest.param(
                Variant("m", (1, 1), (8, 8), 8, block="mobileone"),
                nn.relu,
                id="depthwise",
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_it_stays_near_float(self, variant, activation):
        model, fused = deployed(variant, activation)
        found = quantize(model, fused, images())
        expected = np.asarray(jax.jit(model.apply)(fused, images()))
        difference = np.sqrt(np.mean((found(images()) - expected) ** 2) / np.mean(expected**2))
        assert 0 < difference < 0.05
        # Every step that was tried is told, and what lowers the error is kept.
        steps = ["rounded", "equalized", "biases corrected"]
        assert [step.removesuffix(" (not kept)") for step in found.errors] == (
            steps if activation is nn.relu else [steps[0], steps[2]]
        )
        assert min(found.errors.values()) == pytest.approx(difference, rel=0.05)
        assert found.settings.equalize is ("equalized" in found.errors)
        assert found.settings.bias_correction is ("biases corrected" in found.errors)
        assert found.noise.keys() == set(found.plan.layers)
        assert found.warnings == ()

    def test_equalization_helps_channels_of_uneven_ranges(self):
        model, fused = deployed()
        uneven = jax.tree.map(np.copy, fused)["params"]
        factors = np.exp2(np.random.default_rng(3).integers(-5, 6, 8))
        for leaf in uneven["stage1_block0"]["reparam"].values():
            leaf *= factors
        uneven["stage2_block0"]["reparam"]["kernel"] /= factors[:, None]
        plain = quantize(model, {"params": uneven}, images(), Settings(equalize=False))
        found = quantize(model, {"params": uneven}, images(), Settings())
        assert found.errors["equalized"] < 0.3 * plain.errors["rounded"]
        assert plain.warnings
        assert "stage2_block0/reparam" in plain.warnings[0]
        assert "--equalize" in plain.warnings[0]
        assert found.warnings == ()

    def test_a_step_that_does_not_help_is_not_kept(self):
        model, fused = deployed()
        equal = quantize(model, fused, images(), Settings(equalize=True))
        again = {"params": equal.params}  # nothing is left to equalize
        forced = quantize(model, again, images(), Settings(equalize=True, bias_correction=False))
        free = quantize(model, again, images(), Settings(bias_correction=False))
        off = quantize(model, again, images(), Settings(equalize=False, bias_correction=False))
        assert tuple(forced.errors) == ("rounded", "equalized")
        assert tuple(off.errors) == ("rounded",)
        kept = forced.errors["equalized"] < forced.errors["rounded"]
        assert free.settings.equalize is kept
        same = forced if kept else off
        np.testing.assert_array_equal(free(images()), same(images()))

    def test_bias_correction_restores_the_means(self):
        model, fused = deployed()
        settings = [Settings(bias_correction=on, calibrator="max") for on in (False, True)]
        off, on = (quantize(model, fused, images(), one) for one in settings)
        expected = np.asarray(jax.jit(model.apply)(fused, images())).mean(0)
        shift = [np.abs(found(images()).mean(0) - expected).max() for found in (off, on)]
        assert shift[1] < 0.3 * shift[0]

    def test_channel_maxima_are_those_of_the_blocks(self):
        model, fused = deployed()
        ranges, channels = observe(model, fused["params"], images(), plan(model))
        assert channels.keys() == {layer.name for layer in model.layers}
        assert channels["stem"].max() == pytest.approx(ranges["stage1_block0/reparam"][1])
        assert ranges["stem/reparam"] == (images().min(), images().max())

    def test_bad_input(self):
        model, fused = deployed()
        with pytest.raises(ValueError, match="training form"):
            quantize(model.clone(deploy=False), fused, images())
        trained = random_variables(model.clone(deploy=False), size=8)
        with pytest.raises(ValueError, match="fuse_params"):
            quantize(model, trained, images())
        with pytest.raises(ValueError, match="not Dense"):
            quantize(nn.Dense(3), fused, images())
        other = create_model(TINY, num_classes=7, deploy=True)
        with pytest.raises(ValueError, match=r"num_classes=7.* \d classes"):
            quantize(other, fused, images())
        with pytest.raises(ValueError, match="uint8"):
            quantize(model, fused, np.zeros((4, 8, 8, 3), np.uint8))
        with pytest.raises(ValueError, match="4 calibration images are of a single color"):
            quantize(model, fused, np.ones((4, 8, 8, 3), np.float32))
        with pytest.raises(ValueError, match="NaN"):
            quantize(model, fused, np.full((4, 8, 8, 3), np.nan, np.float32))
        dead = jax.tree.map(np.copy, fused)
        dead["params"]["stem"]["reparam"]["bias"] -= 1e6
        with pytest.raises(ValueError, match=r"stage1_block0/reparam.*empty range"):
            quantize(model, dead, images())
        huge = jax.tree.map(np.copy, fused)
        for name in ("stem", "stage1_block0"):
            huge["params"][name]["reparam"]["kernel"] *= 1e30
        with pytest.raises(ValueError, match="finite"):
            quantize(model, huge, images())
        with pytest.raises(ValueError, match="equalize"):
            quantize(*deployed(TINY, nn.silu), images(), Settings(equalize=True))

    @pytest.mark.parametrize(
        ("wrong", "word"),
        [
            ({"target": "tensort"}, "tensorrt"),
            ({"calibrator": "minmax"}, "entropy"),
            ({"percentile": 0.999}, "99.99"),
        ],
    )
    def test_bad_settings(self, wrong, word):
        with pytest.raises(ValueError, match=word):
            Settings(**wrong)
        assert quantization.Settings().as_dict()["calibrator"] == "mse"
