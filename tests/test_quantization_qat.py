"""Quantization-aware training: what the forward pass computes, and what it keeps."""

import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from configs.digits import get_config
from repvgg_jax import Variant, create_model
from repvgg_jax.convert.source import from_run
from repvgg_jax.data.dataset import load
from repvgg_jax.quantization.fake import fake_quantize, range_scale
from repvgg_jax.quantization.grid import Grid
from repvgg_jax.quantization.qat import RANGES, Qat, measure_norms, split_ranges, with_ranges
from repvgg_jax.quantization.quantize import quantize
from repvgg_jax.quantization.settings import TARGETS, Settings
from repvgg_jax.train.config import as_config
from repvgg_jax.train.loop import train
from repvgg_jax.train.restore import load_run, starting_state
from repvgg_jax.train.workdir import Workdir
from repvgg_jax.weights import save_weights
from tests.helpers.jit import quick_jit
from tests.helpers.runs import SMALL, final_state, small_config, small_experiment
from tests.helpers.trees import random_images, random_variables

BLOCKS = ("repvgg", "qarepvgg", "mobileone", "repopt")


@functools.cache
def network(block="repvgg"):
    model = create_model(Variant("tiny", (1, 1), (8, 8), 8, strides=(2, 1), block=block))
    model = model.clone(num_classes=5)
    variables = jax.tree.map(jnp.asarray, random_variables(model, size=8, seed=3))
    return model, variables


def images(seed=0):
    return jnp.asarray(random_images((6, 8, 8, 3), seed=seed))


def prepared(block="repvgg", **options):
    """A network with ranges, the forward pass, and both compiled."""
    model, variables = network(block)
    qat = Qat(observed_steps=3, **options)
    forward = quick_jit(lambda v, x, step: qat(model, v, x, step))
    return qat, model, with_ranges(variables, qat.unobserved(model)), forward


@pytest.mark.core
class TestFakeQuantize:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.5), (0.5, 1.0), (-4.0, -1.0)])
    def test_it_rounds_as_the_grid_of_a_target(self, target, low, high):
        x = np.random.default_rng(0).uniform(-5, 5, 1000).astype(np.float32)
        x[0] = 0
        found = fake_quantize(x, *range_scale(np.float32(low), np.float32(high), TARGETS[target]))
        grid = Grid.of_range(min(low, 0), max(high, 0), TARGETS[target])
        np.testing.assert_allclose(found, grid(x), atol=1e-6)
        assert 0.0 in np.asarray(found)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_numbers_of_that_many_bits(self, bits):
        x = jnp.linspace(-10, 10, 5001)
        found = np.unique(np.asarray(fake_quantize(x, jnp.float32(0.01), 0, bits)))
        assert len(found) == 2**bits
        np.testing.assert_allclose(np.diff(found), 0.01, rtol=1e-3)

    def test_the_gradient_passes_where_nothing_is_cut_off(self):
        x = jnp.array([-3.0, -1.2, 0.004, 1.2, 3.0])
        slope = jax.grad(lambda x: fake_quantize(x, 0.01).sum())(x)
        np.testing.assert_array_equal(slope, [0, 1, 1, 1, 0])


@pytest.mark.core
@pytest.mark.parametrize("block", BLOCKS)
def test_the_kernels_that_train_are_those_of_the_fold_rounded(block):
    qat, model, variables, _ = prepared(block)
    seen = {}

    def spy(call, args, kwargs, context):
        if isinstance(context.module, (nn.Conv, nn.Dense)) and context.method_name == "__call__":
            kernel = context.module.get_variable("params", "kernel")
            seen["/".join(context.module.path)] = kernel
        return call(*args, **kwargs)

    def kernels(variables):
        with nn.intercept_methods(spy):
            qat(model, variables, images(), jnp.int32(0))
        return dict(seen)

    found = quick_jit(kernels)(variables)
    fused = model.fuse(split_ranges(jax.device_get(variables))[0])["params"]
    expected = {k: v for k, v in flatten_dict(fused, sep="/").items() if k.endswith("kernel")}
    assert {f"{name}/kernel" for name in found} == set(expected)
    for name, kernel in found.items():
        wanted = expected[f"{name}/kernel"]
        scale = np.abs(wanted).reshape(-1, wanted.shape[-1]).max(0) / 127
        numbers = np.asarray(kernel) / scale
        np.testing.assert_allclose(numbers, np.round(numbers), atol=2e-3)  # integers
        assert np.abs(np.round(numbers)).max() == 127
        np.testing.assert_allclose(numbers, wanted / scale, atol=0.5 + 2e-3)  # the nearest ones


def test_gradients_reach_every_branch():
    qat, model, variables, forward = prepared("qarepvgg")
    batch_stats = forward(variables, images(), 0)[1]

    def loss(params):
        logits, _ = qat(model, {"params": params, "batch_stats": batch_stats}, images(), 1)
        return (logits**2).sum()

    slopes = quick_jit(jax.grad(loss))(variables["params"])
    for path, slope in flatten_dict(slopes, sep="/").items():
        assert np.isfinite(slope).all(), path
        assert np.abs(slope).max() > 0, path


class TestRanges:
    def test_the_first_step_takes_those_of_its_images_and_later_ones_follow(self):
        _, _, variables, forward = prepared()
        at = [images(seed) for seed in range(3)]
        first = forward(variables, at[0], 0)[1]
        low, high = (float(first[RANGES]["stem"]["reparam"][end]) for end in ("low", "high"))
        assert (low, high) == (float(at[0].min()), float(at[0].max()))
        after = {"params": variables["params"], "batch_stats": first}
        second = forward(after, at[1], 1)[1][RANGES]["stem"]["reparam"]
        expected = (1 / 11) * float(at[0].max()) + (10 / 11) * float(at[1].max())
        assert float(second["high"]) == pytest.approx(expected, rel=1e-6)

    def test_they_stay_after_the_last_observed_step(self):
        _, _, variables, forward = prepared()
        begun = forward(variables, images(), 0)[1]
        after = {"params": variables["params"], "batch_stats": begun}
        for step, same in ((2, False), (3, True), (30, True)):
            found = forward(after, 5 * images(7), step)[1][RANGES]
            equal = jax.tree.map(lambda a, b: bool(a == b), found, begun[RANGES])
            assert all(jax.tree.leaves(equal)) == same

    @pytest.mark.slow
    def test_what_is_evaluated_is_what_is_exported(self):
        qat, model, variables, forward = prepared("qarepvgg")
        batch_stats = forward(variables, images(), 0)[1]
        fused = model.fuse({"params": variables["params"], "batch_stats": batch_stats})
        simulation = qat.simulation(model)
        logits = np.asarray(simulation.apply(fused, images(1)))
        exported = simulation.quantized(jax.device_get(fused))(np.asarray(images(1)))
        assert np.sqrt(((logits - exported) ** 2).mean() / (logits**2).mean()) < 1e-2
        floats = model.clone(deploy=True).apply({"params": fused["params"]}, images(1))
        assert np.abs(logits - np.asarray(floats)).max() > 1e-4  # it does round

    def test_without_such_a_run_there_are_no_trained_ranges(self):
        model, variables = network()
        deployed = model.fuse(jax.device_get(variables))
        with pytest.raises(ValueError, match="--calibrator=trained"):
            quantize(model.clone(deploy=True), deployed, images(), Settings(calibrator="trained"))

    def test_layers_that_stay_in_float(self):
        qat, model, variables, _ = prepared(float_layers=("stem", "head"))
        names = set(flatten_dict(variables["batch_stats"][RANGES], sep="/"))
        assert not any(name.startswith(("stem/", "head/")) for name in names)
        assert len(names) >= 4
        rounded = qat.simulation(model).rounded(model.fuse(variables)["params"])
        assert (rounded["head"]["kernel"] == variables["params"]["head"]["kernel"]).all()


class TestStatistics:
    def test_frozen_or_following_the_images(self):
        for running in (False, True):
            _, _, variables, forward = prepared(running=running)
            new = split_ranges({"batch_stats": forward(variables, images(), 0)[1]})[0]
            old = split_ranges(variables)[0]["batch_stats"]
            same = jax.tree.map(lambda a, b: bool((a == b).all()), new["batch_stats"], old)
            assert all(jax.tree.leaves(same)) != running

    @pytest.mark.parametrize("block", ["no_branches", "repvgg"])
    def test_measured_norms_keep_the_function(self, block):
        model, variables = network(block)
        x = images()
        found = measure_norms(model, variables, x)
        before, after = (np.asarray(model.apply(v, x)) for v in (variables, found))
        np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
        # They are the statistics of training: a pass in training form keeps them.
        trained = model.clone(momentum=0.0, train_form="branches")
        _, new = trained.apply(found, x, train=True, mutable=["batch_stats"])
        for path, leaf in flatten_dict(new["batch_stats"]["stem"], sep="/").items():
            measured = flatten_dict(found["batch_stats"]["stem"], sep="/")[path]
            np.testing.assert_allclose(leaf, measured, rtol=1e-3, atol=1e-4, err_msg=path)

    def test_a_block_of_one_convolution_gets_what_the_authors_insert(self):
        model, variables = network("no_branches")
        found = measure_norms(model, variables, images())
        fused = model.fuse(jax.device_get(variables))
        conv = fused["params"]["stem"]["reparam"]
        out = nn.Conv(8, (3, 3), 2, padding=((1, 1), (1, 1))).apply({"params": conv}, images())
        norm = found["params"]["stem"]["bn3x3"]
        # In their words scale = sqrt(var) and bias = mean + bias, of a kernel that has the scale.
        np.testing.assert_allclose(norm["bias"], out.mean((0, 1, 2)), atol=1e-3)
        refused = model.fuse(jax.device_get(found))["params"]["stem"]["reparam"]
        for leaf in ("kernel", "bias"):
            np.testing.assert_allclose(refused[leaf], conv[leaf], atol=1e-3)


class TestRuns:
    def test_it_needs_something_to_start_from(self, tmp_path):
        config = small_config(quantize__qat=True)
        with pytest.raises(ValueError, match=r"quantize\.qat.*--init_from"):
            train(config, tmp_path / "run")

    @pytest.mark.parametrize("block", ["no_branches", "repvgg"])
    def test_from_deploy_only_weights_norms_are_inserted(self, tmp_path, block, caplog):
        caplog.set_level("INFO", "repvgg_jax")
        model = create_model(SMALL, num_classes=10)
        deployed = model.fuse(random_variables(model, size=8, channels=1))
        file = tmp_path / "w.safetensors"
        save_weights(file, deployed, family="flax", variant=SMALL)
        variant = dataclasses.replace(SMALL, block=block)
        run = small_experiment(variant, quantize__qat=True, init_from=str(file))
        found, ranges = split_ranges(jax.device_get(starting_state(run).variables))
        assert float(ranges["head"]["high"]) == 0
        assert "120 training images" in caplog.text
        back = run.model.fuse(found)
        for path, leaf in flatten_dict(deployed, sep="/").items():
            np.testing.assert_allclose(
                flatten_dict(back, sep="/")[path], leaf, atol=1e-4 * np.abs(leaf).max()
            )
        x = run.normalize(np.stack([run.dataset.train[i]["image"] for i in range(120)]))
        trained = run.model.clone(momentum=0.0, train_form="branches")
        _, new = trained.apply(found, x, train=True, mutable=["batch_stats"])
        for path, leaf in flatten_dict(new["batch_stats"]["stem"], sep="/").items():
            measured = flatten_dict(found["batch_stats"]["stem"], sep="/")[path]
            np.testing.assert_allclose(measured, leaf, rtol=1e-3, atol=1e-4, err_msg=path)

    def test_a_segmenter_is_refused(self):
        with pytest.raises(ValueError, match=r"quantize\.qat.*classification"):
            small_experiment(quantize__qat=True, task="segmentation")

    def test_an_unknown_layer_is_named(self):
        run = small_experiment(quantize__qat=True, quantize__float_layers=("stm",))
        with pytest.raises(ValueError, match="stm"):
            run.initial_state()

    @pytest.mark.slow
    def test_a_step_trains_branches_and_observes(self):
        run = small_experiment(quantize__qat=True, optimizer__warmup_epochs=0.0)
        state = run.initial_state()
        images = np.stack([run.dataset.train[i]["image"] for i in range(64)])
        labels = np.stack([run.dataset.train[i]["label"] for i in range(64)])
        new, metrics = quick_jit(run.train_step)(state, {"image": images, "label": labels})
        assert np.isfinite(metrics["loss"])
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), new.params, state.params)
        assert all(jax.tree.leaves(moved))
        assert float(new.batch_stats[RANGES]["head"]["high"]) > 0
        model, variables = run.evaluated(new.result)
        assert model.apply(variables, jnp.zeros((2, 8, 8, 1))).shape == (2, 10)


def workdir_config(path):
    return as_config(Workdir(path).read_settings())


@pytest.mark.slow
def test_int8_is_as_accurate_as_float(tmp_path):
    """Section 2 of docs/quantization.md, on real digits: within 0.3 points, one image of 360."""

    def config(epochs, **quantize):
        found = get_config()
        found.train.epochs = epochs
        found.optimizer.warmup_epochs = 0.5
        found.eval.every_epochs = found.checkpoint.every_epochs = epochs
        found.quantize.update(quantize)
        return found

    trained = train(config(8), tmp_path / "float")
    fine = config(2, qat=True)
    fine.optimizer.learning_rate, fine.checkpoint.every_epochs = 0.04, 1
    path = tmp_path / "int8"
    outcome = train(fine, path, init_from=str(tmp_path / "float"))
    assert trained.accuracy > 0.95
    assert outcome.accuracy_int8 >= trained.accuracy_fused - 0.003
    assert outcome.accuracy_int8 >= outcome.accuracy_fused - 0.003
    run = load_run(path)
    assert RANGES not in run.variables["batch_stats"]
    assert float(run.ranges["head"]["high"]) > 0

    # What is converted is what was trained.
    source = from_run(path)
    fused = source.model.fuse(source.variables)
    quantized = source.trained.quantized(fused, source.normalize(source.images), Settings())
    assert quantized.settings.calibrator == "trained"
    assert 0 < quantized.errors["trained"] < 0.2
    labels = load(source.reading).evaluation.labels
    found = (quantized(source.normalize(source.images)).argmax(-1) == labels).mean()
    assert found == pytest.approx(outcome.accuracy_int8, abs=0.003)
    with pytest.raises(ValueError, match="--float-layers=head, but the run"):
        source.trained.quantized(fused, source.images, Settings(float_layers=("head",)))

    # It resumes bitwise, ranges included.
    before = final_state(path, workdir_config(path))
    shutil.rmtree(path / "checkpoints" / "44")
    train(workdir_config(path), path)
    chex.assert_trees_all_equal(before, final_state(path, workdir_config(path)))
