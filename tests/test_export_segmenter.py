"""Fused segmenters in other runtimes: ONNX and StableHLO of any size, LiteRT and SavedModel."""

import functools

import jax
import jax.export
import numpy as np
import pytest

from repvgg_jax import Variant, create_segmenter
from repvgg_jax.export import Network, Normalize, export, export_int8
from repvgg_jax.export.int8 import float_layers
from repvgg_jax.quantization import Settings, quantize
from repvgg_jax.segmentation.resnet import ResNetVariant
from tests.helpers import export_networks as nets
from tests.helpers.trees import random_variables

BACKBONES = {
    "repvgg": Variant("tiny", (1, 2, 1), (4, 6, 8), 4, strides=(2, 2, 2)),
    "fast": Variant("tiny", (1, 5, 1), (4, 6, 8), 4, strides=(2, 2, 2)),
    "resnet": ResNetVariant("tiny-resnet", (1, 1, 1), (2, 3, 4), (4, 4, 6)),
}
SIZE = 34, 41  # of two strides, and neither 8 k + 1


@functools.cache
def segmenter(kind):
    return create_segmenter(
        BACKBONES[kind],
        5,
        fast=kind == "fast",
        output_stride=8 if kind == "resnet" else 4,
        bins=(1, 2, 3),
        width=8,
        auxiliary_width=4,
    )


@functools.cache
def variables(kind, seed=4):
    return random_variables(segmenter(kind), size=SIZE[0], seed=seed)


def images(height, width, count=3):
    return np.random.default_rng(height).integers(0, 256, (count, height, width, 3), np.uint8)


def network(kind, seed=4, params=None, **options):
    return Network(
        segmenter(kind),
        {"params": params} if params else segmenter(kind).fuse(variables(kind, seed)),
        images=images(*SIZE),
        normalize=Normalize(nets.MEAN, nets.STD),
        labels=nets.LABELS,
        **options,
    )


def expected(kind, pixels, seed=4):
    """Logits of the training form."""
    normalized = (pixels / 255 - np.asarray(nets.MEAN)) / np.asarray(nets.STD)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(segmenter(kind).apply)
        return np.asarray(apply(variables(kind, seed), normalized.astype(np.float32)))


OTHER_SIZES = ((9, 57), (65, 33), (8, 8))  # beside those of the artifact's own proof


@pytest.mark.parametrize(
    ("kind", "dtype", "inside"),
    [
        ("repvgg", "float32", False),
        pytest.param("resnet", "float32", False, marks=pytest.mark.slow),
        pytest.param("fast", "float32", True, marks=pytest.mark.slow),
        pytest.param("repvgg", "float16", False, marks=pytest.mark.slow),
    ],
)
def test_onnx_of_any_size(kind, dtype, inside, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    made = network(kind, dynamic_size=True, with_preprocessing=inside)
    artifact = export("onnx", made, tmp_path / "model.onnx", dtype=dtype)
    assert artifact.proofs.keys() == {"onnxruntime", "openvino"}
    session = runtime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    size = ["height", "width"]
    assert taken.shape == (["batch", *size, 3] if inside else ["batch", 3, *size])
    assert given.shape[:2] == ["batch", 5]
    for height, width in OTHER_SIZES:
        pixels = images(height, width, 2)
        fed = pixels if inside else made.normalize(pixels).transpose(0, 3, 1, 2)
        (found,) = session.run(None, {"images": np.ascontiguousarray(fed)})
        wanted = expected(kind, pixels)
        found = found.transpose(0, 2, 3, 1)
        if inside:
            found, wanted = nets.log(found), nets.log(nets.softmax(wanted))
        bound = {"float32": 1e-5, "float16": 1e-2}[dtype]
        assert nets.relative(wanted, found) <= bound, (height, width)


@pytest.mark.slow
def test_stablehlo_of_any_size(tmp_path):
    made = network("repvgg", dynamic_size=True)
    artifact = export("stablehlo", made, tmp_path / "model.stablehlo")
    assert artifact.proven
    call = jax.export.deserialize(bytearray(artifact.path.read_bytes())).call
    for height, width in OTHER_SIZES[:2]:
        pixels = images(height, width, 2)
        found = np.asarray(call(made.normalize(pixels)))
        assert nets.relative(expected("repvgg", pixels), found) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "inside"), [("repvgg", True), ("resnet", False)])
def test_int8_onnx_computes_the_simulation_in_integers(kind, inside, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    made = network(kind, seed=6)
    settings = Settings(calibrator="max", equalize=True, bias_correction=False)
    quantized = quantize(made.model, made.variables, made.images, settings)
    of_int8 = network(kind, params=quantized.params, with_preprocessing=inside)
    artifact = export_int8("onnx", of_int8, quantized, tmp_path / "model.onnx")
    assert all(proof.relative < 0.02 for proof in artifact.proofs.values())
    left = float_layers("onnx", "onnxruntime", artifact.path, of_int8, quantized)
    assert left == ("head",)
    assert len(quantized.plan.layers) == {"repvgg": 10, "resnet": 20}[kind]
    # Equalization is part of it, and the branches as they were trained are what it is near to.
    found = quantized(made.images)
    assert nets.relative(expected(kind, images(*SIZE), seed=6), found) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dynamic"), [("arm", False), ("vnni", True)])
def test_openvino_joins_integers_and_keeps_biases(target, dynamic, tmp_path):
    """OpenVINO rounded what int8 joins to whole numbers, and lost a bias beside a shape."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    made = network("repvgg", seed=6)
    settings = Settings(target=target, calibrator="max", equalize=False, bias_correction=False)
    quantized = quantize(made.model, made.variables, made.images, settings)
    of_int8 = network("repvgg", params=quantized.params, dynamic_size=dynamic)
    artifact = export_int8("onnx", of_int8, quantized, tmp_path / "model.onnx")
    assert artifact.proofs.keys() == {"onnxruntime", "openvino"}
    assert all(proof.relative < 0.02 for proof in artifact.proofs.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "dtype", "bound"),
    [
        ("repvgg", "tflite", "float32", 1e-5),
        ("resnet", "tflite", "float16", 1e-2),
        ("resnet", "savedmodel", "float32", 1e-5),
    ],
)
def test_tensorflow(kind, name, dtype, bound, tmp_path):
    pytest.importorskip("tensorflow")
    pytest.importorskip("ai_edge_litert")
    made = network(kind)
    artifact = export(name, made, tmp_path / "model", dtype=dtype)
    (proof,) = artifact.proofs.values()
    assert proof.relative <= bound
    # What it was compared with is the training form.
    assert nets.relative(expected(kind, images(*SIZE)), made.reference) <= 1e-5


def test_tflite_takes_one_size(tmp_path):
    pytest.importorskip("tensorflow")
    with pytest.raises(ValueError, match="one size"):
        export("tflite", network("repvgg", dynamic_size=True), tmp_path / "model.tflite")
