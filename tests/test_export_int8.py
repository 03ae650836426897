"""Quantized networks in ONNX and LiteRT: runtimes compute what the simulation does, in integers."""

import functools
import json
import zipfile

import numpy as np
import pytest

from repvgg_jax.export import INT8_FORMATS, Network, Normalize, export_int8
from repvgg_jax.export.int8 import float_layers, simulated
from repvgg_jax.quantization import Settings, quantize
from tests.helpers import export_networks as nets

NORMALIZE = Normalize(nets.MEAN, nets.STD)


@functools.cache
def rounded(kind="plain", **settings):
    """A quantized network, calibrated on its images."""
    network = nets.network(kind)
    return quantize(network.model, network.variables, network.images, Settings(**settings))


def network(quantized, *, with_preprocessing=False):
    return Network(
        quantized.model,
        {"params": quantized.params},
        images=nets.images(),
        normalize=NORMALIZE,
        labels=nets.LABELS,
        with_preprocessing=with_preprocessing,
    )


def written(name, quantized, path, **options):
    """The artifact, and by runtime the layers that it leaves in float."""
    of_int8 = network(quantized, **options)
    artifact = export_int8(name, of_int8, quantized, path / INT8_FORMATS[name].filename)
    return artifact, {
        runtime: float_layers(name, runtime, artifact.path, of_int8, quantized)
        for runtime in artifact.proofs
    }


class TestOnnx:
    """QDQ graphs."""

    @pytest.fixture(autouse=True)
    def runtimes(self):
        for package in ("onnx", "onnxruntime", "openvino"):
            pytest.importorskip(package, reason="needs requirements-onnx.txt")

    @pytest.mark.parametrize(
        "kind",
        [
            "plain",
            "se-after",
            *(pytest.param(k, marks=pytest.mark.slow) for k in ("grouped", "se-before", "silu")),
        ],
    )
    def test_runtimes_compute_the_simulation_in_integers(self, kind, tmp_path):
        quantized = rounded(kind)
        artifact, left = written("onnx", quantized, tmp_path)
        assert artifact.proofs.keys() == {"onnxruntime", "openvino"}
        assert all(proof.relative < 0.02 for proof in artifact.proofs.values())
        assert left["onnxruntime"] == ()
        assert artifact.size < nets.artifact("onnx", kind).size
        # Beside the artifact's own proof: the branches as they were trained.
        made = network(quantized)
        found = simulated(made, quantized, made.images)
        assert nets.relative(nets.expected(kind), found) < 0.1

    @pytest.mark.slow
    def test_sums_leave_no_layer_in_float(self, tmp_path):
        artifact, left = written("onnx", rounded("repvit"), tmp_path)
        assert artifact.proofs["onnxruntime"].relative < 1e-5
        assert "openvino" in artifact.proofs  # which rounds sums, too
        assert set(left.values()) == {()}

    def test_what_a_runtime_leaves_in_float_is_named(self, tmp_path):
        # ONNX Runtime folds a ReLU only if the range begins at zero.
        quantized = rounded(target="tensorrt")
        artifact, left = written("onnx", quantized, tmp_path)
        assert left["onnxruntime"] == quantized.plan.layers[:-1]
        assert "head" not in left["onnxruntime"]
        zeros = {t.name: t for t in graph(artifact).initializer if t.name.endswith("/zero")}
        assert all(not any(t.raw_data) for t in zeros.values())

    def test_layers_in_float_by_request(self, tmp_path):
        quantized = rounded(float_layers=("stem", "head"))
        artifact, left = written("onnx", quantized, tmp_path)
        assert left["onnxruntime"] == ()  # of those that are quantized
        weights = {t.name: t.data_type for t in graph(artifact).initializer}
        assert weights["stem/reparam/kernel"] == 1
        assert weights["stage1_block0/reparam/kernel/numbers"] == 3

    def test_settings_and_weights_are_in_the_file(self, tmp_path):
        quantized = rounded()
        artifact, _ = written("onnx", quantized, tmp_path)
        import onnx

        model = onnx.load(artifact.path)
        about = {pair.key: pair.value for pair in model.metadata_props}
        assert json.loads(about["quantization"]) == quantized.settings.as_dict()
        name = "stage1_block0/reparam"
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        kernel = arrays[f"{name}/kernel/numbers"].transpose(2, 3, 1, 0)
        assert kernel.dtype == np.int8
        found = kernel * arrays[f"{name}/kernel/scale"]
        expected = quantized.variables["params"]["stage1_block0"]["reparam"]["kernel"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_bytes_in_probabilities_out(self, tmp_path):
        artifact, left = written("onnx", rounded(), tmp_path, with_preprocessing=True)
        assert left["onnxruntime"] == ()
        assert artifact.description["output"] == "probabilities"

    def test_another_network_is_refused(self, tmp_path):
        quantized = rounded()
        head = quantized.params["head"]
        other = Network(
            quantized.model,
            {"params": {**quantized.params, "head": {**head, "kernel": head["kernel"] + 0.3}}},
            images=nets.images(),
            normalize=NORMALIZE,
        )
        with pytest.raises(ValueError, match=r"disagrees with its simulation in onnxruntime"):
            export_int8("onnx", other, quantized, tmp_path / "model.onnx")


def graph(artifact):
    import onnx

    return onnx.load(artifact.path).graph


class TestLiteRT:
    """The same ranges in a .tflite file."""

    @pytest.fixture(autouse=True)
    def runtimes(self):
        for package in ("tensorflow", "ai_edge_litert"):
            pytest.importorskip(package, reason="needs requirements-tf.txt")

    @pytest.mark.parametrize("kind", ["plain", pytest.param("se-after", marks=pytest.mark.slow)])
    def test_litert_computes_the_simulation_in_integers(self, kind, tmp_path):
        quantized = rounded(kind, target="arm")
        artifact, left = written("tflite", quantized, tmp_path)
        assert artifact.proofs["ai_edge_litert"].relative < 0.02
        assert left["ai_edge_litert"] == ("head",)
        about = json.loads(zipfile.ZipFile(artifact.path).read("metadata.json"))
        assert about["quantization"] == quantized.settings.as_dict()


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"requirements-onnx\.txt"):
        written("onnx", rounded(), tmp_path)
