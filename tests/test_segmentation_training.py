"""Segmentation through the loop that classification uses: training, evaluation, conversion."""

import dataclasses
import json
import sys

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from repvgg_jax import Variant
from repvgg_jax.convert.calibration import Calibrate, calibration_images, evaluation_examples
from repvgg_jax.convert.deployed import load_deployed
from repvgg_jax.convert.int8 import Int8
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import from_run, from_weights
from repvgg_jax.data.dataset import Dataset, load
from repvgg_jax.data.scenes import load_digits_scenes
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.export import parse_targets
from repvgg_jax.quantization import Settings as Settings8
from repvgg_jax.train.config import default_config
from repvgg_jax.train.evaluate import evaluate_only
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.loop import train
from repvgg_jax.train.settings import Settings
from tests.helpers.jit import quick_jit
from tests.helpers.runs import assert_same, final_state, numbers, rows, stopped_at

TINY = Variant("tiny-scenes", (1, 1), (4, 8), 4, strides=(1, 2), stem_stride=2)


def tiny_config(**overrides) -> ConfigDict:
    config = default_config(TINY)
    config.task = "segmentation"
    config.segmentation.output_stride, config.segmentation.bins = 4, (1, 2)
    config.segmentation.width, config.segmentation.auxiliary_width = 8, 4
    config.data.source, config.data.train_size = "scenes", 33
    config.data.eval_size = 64
    config.train.batch_size, config.train.epochs = 8, 2
    config.optimizer.schedule, config.optimizer.learning_rate = "poly", 1.0
    config.eval.batch_size = 8
    config.report.every_steps = 2
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def few_scenes(settings: DataSettings, *, training: bool = True) -> Dataset:
    """32 scenes to train on and 12 to evaluate on."""
    found = load(settings, training=training)
    train, evaluation, _ = load_digits_scenes()
    return dataclasses.replace(
        found,
        train=dataclasses.replace(train, count=32),
        evaluation=dataclasses.replace(evaluation, count=12),
    )


MODULES = ("loop", "evaluate", "restore", "proof_images", "experiment")  # that load data


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(f"repvgg_jax.train.{module}.load", few_scenes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("segmentation") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(f"repvgg_jax.train.{module}.load", few_scenes)
        train(tiny_config(), path)
    return path


@pytest.mark.slow
def test_a_run_reports_miou_of_both_forms_and_draws_examples(run):
    *_, last = rows(run)
    assert 0 < last["final/miou"] < 1
    assert last["final/miou_fused"] == pytest.approx(last["final/miou"], abs=1e-3)
    assert last["step"] == 8
    evaluated = [row for row in rows(run) if "eval/miou" in row]
    assert len(evaluated) == 2
    assert (run / "examples.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "examples" in page
    assert "IoU" in page
    # The best checkpoint is that of the best mIoU.
    manifest = json.loads((run / "checkpoints" / "8" / "manifest" / "metadata").read_text())
    assert manifest["accuracy"] == pytest.approx(evaluated[-1]["eval/miou"])


@pytest.mark.slow
def test_an_interrupted_run_ends_bitwise_the_same(run, tmp_path, monkeypatch):
    with stopped_at(monkeypatch, 5):
        stopped = train(tiny_config(), tmp_path)
    assert 0 < stopped.step < 8
    assert train(tiny_config(), tmp_path).step == 8
    assert numbers(tmp_path)[-1] == numbers(run)[-1]
    # Parameters, statistics, momentum and step, leaf by leaf.
    chex.assert_trees_all_equal(
        final_state(tmp_path, tiny_config()), final_state(run, tiny_config())
    )


@pytest.mark.slow
def test_evaluation_alone_finds_what_the_run_did(run, tmp_path):
    found = evaluate_only(tiny_config(), run)
    last = rows(run)[-1]
    assert float(found.trained["miou"]) == last["final/miou"]
    assert float(found.fused["miou"]) == last["final/miou_fused"]
    assert any("miou" in line for line in found.lines(by_class=True))
    written = found.write(tmp_path)
    assert written[-1].name == "evaluation_worst.png"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    content = json.loads(written[0].read_text())
    losses = [row["loss"] for row in content["worst"]]
    assert len(losses) == 12
    assert losses == sorted(losses, reverse=True)
    # Every scene has as many labeled pixels, so that the mean over scenes is that over pixels.
    assert np.mean(losses) == pytest.approx(content["fused"]["loss"], rel=1e-5)
    assert np.mean([row["accuracy"] for row in content["worst"]]) == pytest.approx(
        content["fused"]["accuracy"], rel=1e-5
    )
    assert {row["class"] for row in content["confused"]} <= set(found.classes)
    with pytest.raises(ValueError, match="masks"):
        evaluate_only(tiny_config(), run, class_map="numbers")


@pytest.mark.slow
def test_microbatches_and_devices_do_not_change_a_step():
    config = tiny_config(bn__group_size=4, segmentation__dropout=0.0, data__masks__blur=1.0)
    one = Experiment.from_config(config)
    batch = _batch(one)
    state = one.initial_state()
    two = dataclasses.replace(one.train_step, microbatches=2)
    whole, halves = (quick_jit(step)(state, batch)[1] for step in (one.train_step, two))
    # Every pixel of a microbatch counts 1 / its own labeled pixels: here all are labeled.
    assert float(whole["loss"]) == pytest.approx(float(halves["loss"]), rel=1e-4)


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step():
    run = Experiment.from_config(tiny_config(segmentation__dropout=0.5))
    step, state, batch = quick_jit(run.train_step), run.initial_state(), _batch(run)
    first, again = (step(state, batch) for _ in range(2))
    assert_same(first, again, 0)
    later = step(state.replace(step=state.step + 1), batch)
    assert float(first[1]["loss"]) == float(again[1]["loss"]) != float(later[1]["loss"])


def _batch(run: Experiment):
    from repvgg_jax.data.batches import train_batches

    batches = train_batches(
        run.dataset, batch_size=8, seed=0, start_step=0, sharding=run.over_batch
    )
    return jax.device_get(next(batches))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"augment__flip": 0.5}, "config.data.masks"),
        ({"augment__mixup": 0.2}, "config.augment.mixup"),
        ({"train__label_smoothing": 0.1}, "label_smoothing"),
        ({"data__sampling": "balanced"}, "sampling"),
        ({"task": "classification"}, "label per pixel"),
        ({"data__source": "digits", "data__train_size": 0}, "per image"),
        ({"segmentation__bins": (1, 1)}, "bins"),
        ({"protocol": "semseq"}, "semseg"),
    ],
)
def test_what_a_segmentation_cannot_be_is_one_line(overrides, word, monkeypatch):
    monkeypatch.setattr("repvgg_jax.train.experiment.load", load)
    config = tiny_config(**overrides)
    if config.data.source == "digits":
        config.data.mean, config.data.std, config.data.eval_size = (0.3,), (0.3,), 0
    with pytest.raises(ValueError, match=word) as caught:
        Experiment.from_config(config)
    assert "\n" not in str(caught.value)


def test_a_resnet_is_a_backbone_only():
    config = default_config("ResNet-50")
    assert Settings.from_config(config).as_json()["model"]["variant"] == "ResNet-50"
    config.task = "classification"
    with pytest.raises(ValueError, match="ResNet-50"):
        Settings.from_config(config)


def test_poly_falls_with_the_power_of_the_steps_left():
    run = Experiment.from_config(tiny_config(optimizer__learning_rate=0.32))
    rates = [run.learning_rate(step) for step in (1, 5)]
    np.testing.assert_allclose(rates, [0.01, 0.01 * 0.5**0.9], rtol=1e-6)


@pytest.mark.slow
def test_a_run_is_converted_proven_and_read_back(run, tmp_path):
    source = from_run(run)
    targets = parse_targets(["safetensors", "orbax", "stablehlo"])
    done = convert(source, Output(tmp_path / "deploy"), targets=targets)
    assert done.proof is not None
    assert done.proof.holds
    assert done.proof.images == 12
    assert "pixels" in str(done.proof)
    assert all("UNPROVEN" not in line for line in done.lines)
    deployed = load_deployed(tmp_path / "deploy")
    assert deployed.predict(source.images[:2]).shape == (2, 64, 64, 11)
    images = source.normalize(source.images[:2])
    again = deployed.model.apply(deployed.variables, images)
    trained = source.model.apply(source.variables, images)
    np.testing.assert_allclose(again, trained, atol=1e-5 * float(np.abs(trained).max()))


@pytest.mark.slow
def test_onnx_runtimes_agree_pixel_by_pixel(run, tmp_path):
    pytest.importorskip("onnxruntime")
    source = from_run(run)
    for name, formats, inside in (("a", ["onnx", "onnx:float16"], False), ("b", ["onnx"], True)):
        done = convert(
            source,
            Output(tmp_path / name),
            targets=parse_targets([*formats, "safetensors"]),
            with_preprocessing=inside,
        )
        assert all("UNPROVEN" not in line for line in done.lines)
    # The directory is a source, too.
    again = convert(
        from_weights(str(tmp_path / "a")), Output(tmp_path / "c"), targets=parse_targets(["onnx"])
    )
    assert again.proof is None


@pytest.mark.slow
def test_int8_is_judged_by_miou(run, tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("repvgg_jax.convert.calibration.load", few_scenes)
    monkeypatch.setattr("repvgg_jax.convert.int8.TIMED_ROUNDS", (1, 1))
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if not installed
    source, output = from_run(run), tmp_path / "deploy"
    done = convert(
        source,
        Output(output),
        targets=parse_targets(["safetensors"]),
        int8=Int8(Calibrate("run", 16), Settings8(equalize=False, bias_correction=False)),
    )
    found = load_deployed(output).proof["int8"]
    measured = found["runtimes"]["onnx"]["onnxruntime"]
    assert measured["float_layers"] == ["head"]  # ONNX Runtime has no integers in and floats out
    assert found["calibration"]["images"] == 16

    # Measured again, by hand.
    labels = evaluation_examples(source).labels
    session = runtime.InferenceSession(output / "model.int8.onnx")
    images = source.normalize(source.images).transpose(0, 3, 1, 2)
    (logits,) = session.run(None, {"images": images})
    classes = logits.argmax(1)
    ious = []
    for label in range(11):
        of_label, of_class = labels == label, classes == label
        if (of_label | of_class).any():
            ious.append((of_label & of_class).sum() / (of_label | of_class).sum())
    assert found["int8_miou"] == pytest.approx(np.mean(ious), rel=1e-12)
    assert found["int8_accuracy"] == pytest.approx((classes == labels).mean(), rel=1e-12)
    assert found["float_miou"] == pytest.approx(rows(run)[-1]["final/miou"], abs=1e-3)
    fused = np.asarray(source.model.apply(source.variables, source.normalize(source.images)))
    agreement = (fused.argmax(-1) == classes).mean()
    assert found["agreement"] == pytest.approx(agreement, abs=1e-3)
    assert 0.9 < found["agreement"] < 1
    told = done.table()
    assert "mIoU" in told
    assert f"{found['agreement']:.2%} of the pixels of 12 validation images" in told


@pytest.mark.slow
def test_files_to_calibrate_with_are_whole_with_a_border(run, tmp_path):
    source = from_run(run)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    (image,) = calibration_images(source, Calibrate(str(tmp_path))).images
    np.testing.assert_array_equal(image[:40, :50], pixels)
    mean = [round(255 * value) for value in source.normalize.mean]
    assert (image[40:] == mean).all()
    assert (image[:, 50:] == mean).all()
    Image.fromarray(np.tile(pixels, (2, 2, 1))).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png.*80x100 pixels, more than 64x64"):
        calibration_images(source, Calibrate(str(tmp_path)))


@pytest.mark.slow
def test_formats_of_classifiers_refuse_a_segmenter(run, tmp_path):
    with pytest.raises(ValueError, match="holds classifiers"):
        convert(from_run(run), Output(tmp_path / "d"), targets=parse_targets(["torch-timm"]))
    assert not (tmp_path / "d").exists()
