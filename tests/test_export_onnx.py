"""ONNX: the graph says what it should and no more, and two runtimes agree with the JAX model."""

import json

import export_networks as nets
import numpy as np
import pytest

from repvgg_jax.export import export

onnx = pytest.importorskip("onnx", reason='needs pip install "repvgg-jax[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "repvgg-jax[onnx]"')


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def nchw(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("kind", nets.KINDS)
def test_float32_is_the_train_form_in_every_batch_size(kind, tmp_path):
    pytest.importorskip("openvino", reason='needs pip install "repvgg-jax[onnx]"')
    network = nets.network(kind)
    artefact = export("onnx", network, tmp_path / "model.onnx")
    assert artefact.proofs.keys() == {"onnxruntime", "openvino"}
    assert not artefact.unproven
    assert all(proof.relative <= 1e-5 for proof in artefact.proofs.values())

    # Beside the artefact's own proof: the network before it was fused, by hand.
    opened = session(artefact.path)
    (given,) = opened.get_inputs()
    (answer,) = opened.get_outputs()
    output = "features" if kind == "features" else "logits"
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, 24, 24])
    assert (answer.name, answer.shape) == (output, ["batch", network.outputs])
    for count in (1, 7):
        (found,) = opened.run(None, {"images": nchw(network.images[:count])})
        assert nets.relative(nets.train_form_logits(kind)[:count], found) <= 1e-5


@pytest.mark.parametrize("kind", nets.KINDS)
def test_float16_is_close_and_half_the_size(kind, tmp_path):
    full = export("onnx", nets.network(kind), tmp_path / "full.onnx")
    half = export("onnx", nets.network(kind), tmp_path / "half.onnx", dtype="float16")
    (found,) = session(half.path).run(None, {"images": nchw(nets.network(kind).images)})
    assert found.dtype == np.float32
    # Half precision rounds to 5e-4; six layers of it stay within a few times that.
    assert nets.relative(nets.train_form_logits(kind), found) <= 5e-3
    graph = onnx.load(half.path).graph
    types = {t.name: t.data_type for t in graph.initializer}
    assert types["stage1_block0/reparam/kernel"] == onnx.TensorProto.FLOAT16
    weights = sum(len(t.raw_data) for t in graph.initializer)
    assert weights < 0.6 * sum(len(t.raw_data) for t in onnx.load(full.path).graph.initializer)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_graph_has_nothing_but_the_network(dtype, tmp_path):
    path = export("onnx", nets.network("plain"), tmp_path / "model.onnx", dtype=dtype).path
    casts = ["Cast"] if dtype == "float16" else []
    trunk = ["Conv", "Relu"] * 6
    head = ["GlobalAveragePool", "Flatten", "Gemm"]
    assert operators(path) == [*casts, *trunk, *casts, *head]


@pytest.mark.parametrize("kind", nets.KINDS)
def test_no_transposes(kind, tmp_path):
    path = export("onnx", nets.network(kind), tmp_path / "model.onnx").path
    assert not {"Transpose", "Reshape", "Pad", "Squeeze", "Unsqueeze"} & set(operators(path))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["plain", "se-after"])
def test_preprocessing_travels_inside(kind, dtype, tmp_path):
    network = nets.network(kind, with_preprocessing=True)
    path = export("onnx", network, tmp_path / "model.onnx", dtype=dtype).path
    (given,) = session(path).get_inputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", 24, 24, 3])
    (found,) = session(path).run(["probabilities"], {"images": nets.images()})
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    expected = nets.softmax(nets.train_form_logits(kind))
    assert nets.relative(expected, found) <= (1e-5 if dtype == "float32" else 5e-3)
    # Decoders give NHWC: one transpose, of three channels, and a cast right at the input.
    assert operators(path)[:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert operators(path).count("Transpose") == 1


def test_metadata_travels_along(tmp_path):
    path = export("onnx", nets.network("se-before"), tmp_path / "model.onnx").path
    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert props["variant"] == "tiny"
    assert props["input_layout"] == "NCHW"
    assert json.loads(props["image_size"]) == [24, 24]
    assert json.loads(props["labels"]) == ["cat", "dog", "élan", "fox", "gnu"]
    assert json.loads(props["mean"]) == [0.4, 0.45, 0.5]
    assert json.loads(props["std"]) == [0.2, 0.25, 0.3]
    # The runtime hands them out as well.
    assert session(path).get_modelmeta().custom_metadata_map == props


def test_weights_beyond_float16_are_named(tmp_path):
    network = nets.fresh("plain")
    network.params["stage2_block1"]["reparam"]["kernel"][0, 0, 0, 0] = 7e4
    with pytest.raises(ValueError, match=r"stage2_block1/reparam/kernel holds 7e\+04.*float32"):
        export("onnx", network, tmp_path / "model.onnx", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_graph_that_is_not_the_network_is_never_written(runtime, tmp_path, monkeypatch):
    pytest.importorskip(runtime, reason='needs pip install "repvgg-jax[onnx]"')
    other = "openvino" if runtime == "onnxruntime" else "onnxruntime"
    monkeypatch.setitem(__import__("sys").modules, other, None)
    network = nets.fresh("plain")
    assert network.reference.any()  # the JAX model has answered; now its weights change
    kernel = network.params["stage1_block0"]["reparam"]["kernel"]
    kernel[...] = kernel[::-1]
    (tmp_path / "model.onnx").write_text("older artefact")
    with pytest.raises(ValueError, match=rf"{runtime} disagrees with the JAX model"):
        export("onnx", network, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "older artefact"
