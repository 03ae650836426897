"""Classes of image files: the same numbers as in evaluation, by every way to name a network."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.classifier import Classifier, center_crop, find_images
from repvgg_jax.convert.deployed import load_deployed
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import from_run
from repvgg_jax.data.dataset import load
from repvgg_jax.export import Target, parse_targets
from repvgg_jax.normalize import Normalize
from repvgg_jax.train.restore import load_run
from tests.helpers.commands import ROOT


def predict(*arguments: object) -> subprocess.CompletedProcess:
    """Runs the command."""
    command = [sys.executable, "-m", "repvgg_jax.predict", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def deployed(small_run, tmp_path_factory):
    """A converted run on digits."""
    path = tmp_path_factory.mktemp("predict") / "deploy"
    convert(from_run(small_run[0]), Output(path), targets=parse_targets(["safetensors"]))
    return path


@pytest.fixture(scope="module")
def images(small_run, tmp_path_factory):
    """Validation images as files, and their probabilities by the training form."""
    ran = load_run(small_run[0])
    source = load(ran.settings.data).evaluation
    path = tmp_path_factory.mktemp("images")
    (path / "more").mkdir()
    pixels = np.stack([source[i]["image"] for i in range(5)])
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(path / ("more" if i > 2 else ".") / f"{i}.png")
    logits = ran.model.apply(ran.variables, ran.normalize(pixels))
    return path, pixels, np.asarray(jax.nn.softmax(logits))


def test_a_deployment_predicts_what_evaluation_does(deployed, images):
    path, pixels, expected = images
    net = rv.load_deployed(deployed)
    read = np.stack([net.preprocess(file) for file in find_images([str(path)])])
    np.testing.assert_array_equal(read, pixels)
    np.testing.assert_allclose(net.predict(read), expected, atol=1e-5)
    np.testing.assert_array_equal(net.preprocess(pixels[0]), pixels[0])
    assert net.classes == tuple("0123456789")
    assert net.predict(pixels[:0]).shape == (0, 10)


def test_variable_weights_give_the_same(deployed, images):
    _, pixels, expected = images
    classifier = load_deployed(deployed).classifier(constant_weights=False)
    np.testing.assert_allclose(classifier.predict(pixels), expected, atol=1e-5)
    np.testing.assert_allclose(classifier.predict(pixels[:1]), expected[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((8, 8, 1), np.uint8), "must be uint8"),
        (np.zeros((2, 8, 8, 1), np.float32), "must be uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"width, 1\).*\(2, 8, 8, 3\)"),
        (np.zeros((2, 0, 8, 1), np.uint8), r"\(2, 0, 8, 1\)"),
        ([np.zeros((8, 8, 1)), np.zeros((9, 8, 1))], "one size"),
    ],
)
def test_images_of_another_kind(deployed, bad, message):
    with pytest.raises(ValueError, match=message):
        load_deployed(deployed).predict(bad)


@pytest.mark.parametrize(
    "bad",
    [
        np.full((9, 9, 1), np.nan, np.float32),
        np.zeros((9, 9, 1), np.uint16),
        np.zeros((9, 9), np.uint8),
        np.zeros((0, 9, 1), np.uint8),
        None,
    ],
    ids=lambda bad: "none" if bad is None else f"{bad.dtype}, {bad.ndim} axes, {bad.size} pixels",
)
def test_pixels_of_another_kind(deployed, bad):
    with pytest.raises(ValueError, match=r"uint8 pixels .*got"):
        load_deployed(deployed).preprocess(bad)


def test_how_images_are_read_is_stored(deployed, small_run):
    """As the run's evaluation reads them; directories of earlier versions do not say."""
    content = json.loads((deployed / "metadata.json").read_text())
    assert content["crop"] == {"fraction": 1.0, "background": [255, 255, 255], "white": 0.0}
    assert from_run(small_run[0]).crop.fraction == 1.0


RUNTIMES = {
    "jax": ("stablehlo", "jax"),
    "stablehlo": ("stablehlo:bfloat16", "jax"),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "litert": ("tflite", "ai_edge_litert"),
    "tensorflow": ("savedmodel", "tensorflow"),
}


@pytest.mark.parametrize(
    ("runtime", "inside"),
    [
        ("jax", False),
        ("stablehlo", True),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in list(RUNTIMES)[2:]),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in list(RUNTIMES)[2:]),
    ],
)
def test_runtimes_predict_what_evaluation_does(runtime, inside, small_run, images, tmp_path):
    """Each runs its own artifact, whether it normalizes inside or not."""
    wanted, module = RUNTIMES[runtime]
    for package in {"onnx": ["onnx", module]}.get(wanted, [module]):
        pytest.importorskip(package, reason="needs the runtime")
    if wanted in ("tflite", "savedmodel"):
        pytest.importorskip("tensorflow", reason="needs requirements-tf.txt")
    convert(
        from_run(small_run[0]),
        Output(tmp_path / "deploy"),
        targets=parse_targets(["safetensors", wanted]),
        with_preprocessing=inside,
    )
    _, pixels, expected = images
    classifier = load_deployed(tmp_path / "deploy").classifier(runtime=runtime)
    assert classifier.run is not None
    tolerance = 3e-2 if "bfloat16" in wanted else 1e-5
    np.testing.assert_allclose(classifier.predict(pixels), expected, atol=tolerance)
    np.testing.assert_allclose(classifier.predict(pixels[:1]), expected[:1], atol=tolerance)
    # What ran is the artifact: without the file there is nothing to run.
    (file,) = (tmp_path / "deploy").glob(Target.parse(wanted).filenames[0])
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"has nothing for --runtime={runtime}"):
        load_deployed(tmp_path / "deploy").classifier(runtime=runtime)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("onnxruntim", r"unknown; did you mean 'onnxruntime'"),
        ("openvino:float16", r"has nothing for --runtime=openvino:float16, .*--format onnx"),
    ],
)
def test_runtimes_without_an_artifact(deployed, runtime, message):
    with pytest.raises(ValueError, match=message):
        load_deployed(deployed).classifier(runtime=runtime)


@pytest.mark.slow
def test_masks_of_a_segmenter(tmp_path):
    """The labels of a whole image, and the image under their colors."""
    variant = rv.Variant("tiny", (1, 1, 1, 1), (8, 8, 16, 16), 8)
    network = rv.create_segmenter(variant, num_classes=3, width=8, auxiliary_width=8)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 41, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    normalize = Normalize((0.5,), (0.25,))
    variables = jax.jit(network.init)(jax.random.key(0), normalize(pixels[None]))
    logits = jax.jit(network.apply)(variables, normalize(pixels[None]))
    crop = center_crop((33, 33, 3), fraction=1.0, background=(0, 0, 0), white=0.0)
    segmenter = Classifier(
        network.clone(deploy=True), rv.fuse_params(variables), normalize, (), (33, 33, 3), crop
    )
    assert segmenter.predict(np.zeros((0, 4, 5, 3), np.uint8)).shape == (0, 4, 5, 3)
    mask_path, overlay_path, mask = segmenter.write_mask(tmp_path / "street.png", tmp_path)
    ranked = np.sort(np.asarray(logits[0]), axis=-1)
    clear = ranked[..., -1] - ranked[..., -2] > 1e-4
    np.testing.assert_array_equal(mask[clear], np.asarray(logits[0]).argmax(-1)[clear])
    np.testing.assert_array_equal(np.asarray(Image.open(mask_path)), mask)
    assert mask_path.name == "street.mask.png"
    assert np.asarray(Image.open(overlay_path)).shape == (33, 41, 3)


def test_images_are_found(tmp_path):
    for name in ("a.JPG", "b/c.png", "b/notes.txt", "b/d/e.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [name.removeprefix(f"{tmp_path}/") for name in find_images([str(tmp_path)])]
    assert names == ["a.JPG", "b/c.png", "b/d/e.webp"]
    assert find_images([f"{tmp_path}/**/*.png"]) == [f"{tmp_path}/b/c.png"]
    assert find_images([f"{tmp_path}/*"]) == find_images([str(tmp_path)])  # b is a directory
    assert find_images([f"{tmp_path}/b/**/[!n]*"]) == find_images([f"{tmp_path}/b"])
    (tmp_path / "none").mkdir()
    assert find_images([f"{tmp_path}/*"]) == find_images([str(tmp_path)])
    with pytest.raises(ValueError, match=r"n\* holds no images"):
        find_images([f"{tmp_path}/n*"])
    with pytest.raises(ValueError, match="none holds no images"):
        find_images([f"{tmp_path}/none"])
    with pytest.raises(ValueError, match=r"no image file.*nothing\.png"):
        find_images([f"{tmp_path}/nothing.png"])


@pytest.mark.slow
@pytest.mark.system
def test_the_command(deployed, images, small_run):
    """JSON and nothing else on standard output, for a directory of images; then a table."""
    path, _, expected = images
    files = find_images([str(path)])
    done = predict(f"--model={deployed}", "--json", path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [image["file"] for image in found] == files
    for image, probabilities in zip(found, expected, strict=True):
        assert len(image["top"]) == 5
        assert image["top"][0]["class"] == str(probabilities.argmax())
        assert image["top"][0]["probability"] == pytest.approx(probabilities.max(), abs=1e-5)
    done = predict(f"--model={small_run[0]}", "--top=1", files[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{files[0]}  {expected[0].argmax()} {expected[0].max():.1%}")


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=DEPLOY"], "give --model"),
        (["--model=DEPLOY", "--step=3", "IMAGE"], "--step=3 is for a run"),
        (["--model=DEPLOY", "README.md"], r"README.md: .* no image format"),
        (["--model=RUN", "--runtime=jax", "IMAGE"], r"--runtime=jax is for .* convert\.py"),
    ],
)
def test_what_cannot_be_classified(deployed, images, small_run, arguments, message):
    places = {"DEPLOY": str(deployed), "RUN": str(small_run[0]), "IMAGE": str(images[0] / "0.png")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    done = predict(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)
