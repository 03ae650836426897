"""`convert.py --quantize int8`: what is written, what is measured, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from repvgg_jax.convert.calibration import Calibrate, calibration_images, evaluation_examples
from repvgg_jax.convert.deployed import load_deployed
from repvgg_jax.convert.int8 import Int8
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import from_run, from_weights, reading_of
from repvgg_jax.export import parse_targets
from repvgg_jax.quantization import Settings
from tests.helpers import export_networks as nets

WEIGHTS = parse_targets(["safetensors"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The images of that network as files, in no order of classes."""
    path = tmp_path_factory.mktemp("images")
    for i, image in enumerate(nets.images()):
        Image.fromarray(image).save(path / f"{i}.png")
    return path


def asked(text, **settings):
    return Int8(Calibrate.parse(str(text)), Settings(**settings))


class TestCalibrate:
    """The images."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("run", ("run", None)),
            ("run:64", ("run", 64)),
            ("folder:/data:12", ("folder:/data", 12)),
            ("tfds:mnist", ("tfds:mnist", None)),
            ("folder:2024", ("folder:2024", None)),
            ("masks:2020", ("masks:2020", None)),
            ("cityscapes:7:12", ("cityscapes:7", 12)),
        ],
    )
    def test_source_and_number(self, text, expected):
        assert dataclasses.astuple(Calibrate.parse(text)) == expected

    @pytest.mark.parametrize("text", ["", ":5", "run:0", "run:-3"])
    def test_not_a_source(self, text):
        with pytest.raises(ValueError, match="SOURCE:N"):
            Calibrate.parse(text)

    def test_a_directory_in_even_distances(self, folder):
        found = calibration_images(nets.source(), Calibrate(str(folder), 4))
        assert found.images.shape == (4, nets.HEIGHT, nets.WIDTH, 3)
        assert found.what == f"4 images of {folder}"

    def test_training_images_of_a_run_and_of_a_data_set(self, small_run):
        path, _ = small_run
        run = from_run(path)
        found = calibration_images(run, Calibrate("run", 50))
        same = calibration_images(run, Calibrate("digits", 50))
        assert found.what == "50 training images of digits"
        np.testing.assert_array_equal(found.images, same.images)
        assert not (found.images[:, None] == run.images[None]).all((2, 3, 4)).any()

    def test_labels_of_the_evaluation(self, small_run):
        path, _ = small_run
        run = from_run(path)
        found = evaluation_examples(run)
        assert found.labels.shape == (360,)
        assert np.array_equal(found.images, run.images)
        other = dataclasses.replace(run, labels=tuple("abcdefghij"))
        assert evaluation_examples(other).labels is None
        assert "classes" in evaluation_examples(other).note
        assert evaluation_examples(nets.source()).labels is None

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("/nowhere", "unknown data set"),
            ("run", "--workdir"),
            ("digits:4", r"\(8, 8, 1\).*\(24, 32, 3\)"),
            ("{folder}:18", "18 images.*17"),
            ("{empty}", "no images"),
            ("{plain}", "2 images are of a single color"),
            ("{text}", "a.png: 10 bytes of no image"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, text, word, folder, tmp_path):
        for name in ("empty", "plain", "text"):
            (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (40, 40), (9 * i, 8, 7)).save(tmp_path / "plain" / f"{i}.png")
        (tmp_path / "text" / "a.png").write_bytes(b"no picture")
        places = {name: tmp_path / name for name in ("empty", "plain", "text")}
        wanted = Calibrate.parse(text.format(folder=folder, **places))
        reading = reading_of((nets.HEIGHT, nets.WIDTH, 3), None)
        with pytest.raises(ValueError, match=word) as error:
            calibration_images(nets.source(reading=reading), wanted)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"--calibrate={wanted}")


class TestConvert:
    """The whole, with ONNX Runtime."""

    @pytest.fixture(autouse=True)
    def runtimes(self):
        for package in ("onnx", "onnxruntime"):
            pytest.importorskip(package, reason="needs requirements-onnx.txt")

    def test_a_run_end_to_end(self, small_run, tmp_path):
        import onnxruntime

        path, _ = small_run
        run, output = from_run(path), tmp_path / "deploy"
        settings = Settings(calibrator="percentile", percentile=99.9)
        done = convert(
            run,
            Output(output),
            targets=WEIGHTS,
            int8=Int8(Calibrate("run", 64), settings),
        )
        deployed = load_deployed(output)
        found = deployed.proof["int8"]
        assert "model.int8.onnx" in deployed.proof["sha256"]
        assert found["images"] == 360
        assert found["calibration"]["images"] == 64
        assert found["settings"]["percentile"] == 99.9
        steps = found["logit_errors"]
        assert [step.removesuffix(" (not kept)") for step in steps] == [
            "rounded",
            "equalized",
            "biases corrected",
        ]
        assert found["settings"]["equalize"] is ("equalized" in steps)

        # Measured again, by hand.
        labels = evaluation_examples(run).labels
        images = run.normalize(run.images).transpose(0, 3, 1, 2)
        session = onnxruntime.InferenceSession(output / "model.int8.onnx")
        (logits,) = session.run(None, {"images": images})
        fused = jax.jit(deployed.model.apply)(deployed.variables, run.normalize(run.images))
        expected = np.asarray(fused).argmax(-1)
        assert found["int8_accuracy"] == np.mean(logits.argmax(-1) == labels)
        assert found["float_accuracy"] == pytest.approx(np.mean(expected == labels), abs=1 / 360)
        assert found["agreement"] == pytest.approx(np.mean(logits.argmax(-1) == expected), abs=0.01)
        assert found["agreement"] > 0.9
        measured = found["runtimes"]["onnx"]["onnxruntime"]
        assert measured["int8_bytes"] == (output / "model.int8.onnx").stat().st_size
        assert measured["int8_bytes"] < measured["float_bytes"]
        assert measured["float_images_per_second"] > 0
        assert measured["float_layers"] == []
        assert found["runtimes"]["jax"]["simulation"]["float_accuracy"] is not None
        told = done.table()
        assert f"{found['int8_accuracy']:.2%}" in told
        assert "all layers in int8" in told
        assert "percentile 99.9" in told

        # Other formats of the same weights keep the file and what was measured of it.
        convert(from_weights(str(output)), Output(output), targets=parse_targets(["orbax"]))
        again = load_deployed(output)
        assert again.proof["int8"] == found
        assert (output / "model.int8.onnx").is_file()

    def test_without_labels_there_is_agreement_alone(self, folder, tmp_path):
        done = convert(
            nets.source(), Output(tmp_path / "d"), targets=WEIGHTS, int8=asked(f"{folder}:12")
        )
        found = json.loads((tmp_path / "d" / "proof.json").read_text())["int8"]
        assert (found["float_accuracy"], found["int8_accuracy"]) == (None, None)
        assert found["agreement"] > 0.8
        assert "--data" in done.table()

    @pytest.mark.slow
    def test_layers_that_a_runtime_leaves_in_float_are_told(self, folder, tmp_path):
        done = convert(
            nets.source(),
            Output(tmp_path / "d"),
            targets=WEIGHTS,
            int8=asked(folder, target="tensorrt", bias_correction=False),
        )
        found = json.loads((tmp_path / "d" / "proof.json").read_text())["int8"]
        left = found["runtimes"]["onnx"]["onnxruntime"]["float_layers"]
        assert left[0] == "stem/reparam"
        assert f"{len(left)} of {len(left) + 1} layers in float: stem/reparam" in done.table()

    def test_nothing_is_written_if_it_fails(self, folder, tmp_path):
        options = {"targets": WEIGHTS}
        output = Output(tmp_path / "d")
        with pytest.raises(ValueError, match="--calibrate=/nowhere"):
            convert(nets.source(), output, int8=asked("/nowhere"), **options)
        with pytest.raises(ValueError, match=r"classes.*--outputs=stage1"):
            convert(nets.source(), output, int8=asked(folder), feature_maps=("stage1",), **options)
        with pytest.raises(ValueError, match=r"classes.* 0"):
            convert(nets.source("features"), output, int8=asked(folder), **options)
        with pytest.raises(ValueError, match="float-layers=stage8"):
            convert(nets.source(), output, int8=asked(folder, float_layers=("stage8",)), **options)
        assert not list(tmp_path.iterdir())
