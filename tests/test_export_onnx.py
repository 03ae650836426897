"""ONNX: the graph says what it should and no more, and two runtimes agree with the JAX model."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from repvgg_jax import fuse_params
from repvgg_jax.export import Network, Normalize, export
from tests.helpers import export_networks as nets

EXTRA = "needs requirements-onnx.txt"
onnx = pytest.importorskip("onnx", reason=EXTRA)
onnxruntime = pytest.importorskip("onnxruntime", reason=EXTRA)
pytest.importorskip("openvino", reason=EXTRA)


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def nchw(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("kind", [*nets.KINDS, *nets.ACTIVATED])
def test_float32_is_the_train_form_at_every_batch_size(kind):
    artifact = nets.artifact("onnx", kind)
    assert artifact.proofs.keys() == {"onnxruntime", "openvino"}
    assert not artifact.unproven
    assert all(proof.relative <= 1e-5 for proof in artifact.proofs.values())

    # Beside the artifact's own proof: the network as it was before it was fused.
    opened = session(artifact.path)
    (taken,), (given,) = opened.get_inputs(), opened.get_outputs()
    assert (taken.name, taken.type) == ("images", "tensor(float)")
    assert taken.shape == ["batch", 3, nets.HEIGHT, nets.WIDTH]
    assert given.name == ("features" if kind == "features" else "logits")
    assert given.shape == ["batch", 16 if kind == "features" else 5]
    for count in (1, 7):
        (found,) = opened.run(None, {"images": nchw(nets.network(kind).images[:count])})
        assert nets.relative(nets.expected(kind)[:count], found) <= 1e-5


@pytest.mark.parametrize("kind", nets.KINDS)
def test_float16_is_close_and_half_the_size(kind):
    full, half = nets.artifact("onnx", kind), nets.artifact("onnx", kind, "float16")
    (found,) = session(half.path).run(None, {"images": nchw(nets.network(kind).images)})
    assert found.dtype == np.float32
    # One rounding is 5e-4; six layers of them stay within a few times that.
    assert 0 < nets.relative(nets.expected(kind), found) <= 5e-3
    kernels = {t.name: t.data_type for t in onnx.load(half.path).graph.initializer}
    assert kernels["stage1_block0/reparam/kernel"] == onnx.TensorProto.FLOAT16
    assert weights_size(half.path) < 0.52 * weights_size(full.path)


def weights_size(path):
    """Bytes of all weights but the classifier's, which keep their type."""
    weights = onnx.load(path).graph.initializer
    return sum(len(t.raw_data) for t in weights if not t.name.startswith("head"))


@pytest.mark.parametrize(
    ("kind", "dtype", "inside"),
    [
        ("plain", "float32", False),
        ("plain", "float16", True),
        ("se-after", "float32", True),
        ("dilated", "float16", False),
        pytest.param("repvit", "float32", False, marks=pytest.mark.slow),
    ],
)
def test_feature_maps_at_any_size(kind, dtype, inside, tmp_path):
    stages = ("stem", "stage2")
    network = Network(
        nets.model(kind),
        nets.model(kind).fuse(nets.variables(kind)),
        images=nets.images(),
        normalize=Normalize(nets.MEAN, nets.STD),
        with_preprocessing=inside,
        feature_maps=stages,
        dynamic_size=True,
    )
    artifact = export("onnx", network, tmp_path / "model.onnx", dtype=dtype)
    assert artifact.proofs.keys() == {"onnxruntime", "openvino"}
    opened = session(artifact.path)
    (taken,) = opened.get_inputs()
    size = ["height", "width"]
    assert taken.shape == (["batch", *size, 3] if inside else ["batch", 3, *size])
    assert [(given.name, given.shape) for given in opened.get_outputs()] == [
        ("stem", ["batch", 8, "stem_height", "stem_width"]),
        ("stage2", ["batch", 16, "stage2_height", "stage2_width"]),
    ]
    model = nets.model(kind)
    for height, width in ((24, 24), (19, 33)):
        images = np.resize(nets.images()[:2], (2, height, width, 3))
        normalized = network.normalize(images)
        fed = images if inside else nchw(normalized)
        with jax.default_matmul_precision("highest"):
            wanted = model.apply(nets.variables(kind), normalized, method="features")
        for stage, found in zip(stages, opened.run(None, {"images": fed}), strict=True):
            assert found.dtype == np.float32
            bound = {"float32": 1e-5, "float16": 5e-3}[dtype]
            assert nets.relative(nchw(np.asarray(wanted[stage])), found) <= bound
    # Nothing behind the last map.
    names = {tensor.name for tensor in onnx.load(artifact.path).graph.initializer}
    assert not [name for name in names if name.startswith(("stage3", "head"))]


def test_logits_at_any_size(tmp_path):
    network = Network(
        nets.model("plain"),
        fuse_params(nets.variables("plain")),
        images=nets.images(),
        normalize=Normalize(nets.MEAN, nets.STD),
        dynamic_size=True,
    )
    opened = session(export("onnx", network, tmp_path / "model.onnx").path)
    images = np.float32(np.random.default_rng(0).normal(size=(2, 41, 22, 3)))
    with jax.default_matmul_precision("highest"):
        wanted = nets.model("plain").apply(nets.variables("plain"), images)
    (found,) = opened.run(["logits"], {"images": nchw(images)})
    assert nets.relative(np.asarray(wanted), found) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_graph_has_nothing_but_the_network(dtype):
    path = nets.artifact("onnx", "plain", dtype).path
    casts = ["Cast"] if dtype == "float16" else []
    trunk, head = ["Conv", "Relu"] * 6, ["GlobalAveragePool", "Flatten", "Gemm"]
    assert operators(path) == [*casts, *trunk, *casts, *head]


@pytest.mark.parametrize("kind", nets.KINDS)
def test_nothing_is_moved_about(kind):
    path = nets.artifact("onnx", kind).path
    assert not {"Transpose", "Reshape", "Pad", "Squeeze", "Unsqueeze"} & set(operators(path))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["plain", "se-after"])
def test_preprocessing_travels_inside(kind, dtype):
    path = nets.artifact("onnx", kind, dtype, with_preprocessing=True).path
    (taken,) = session(path).get_inputs()
    assert (taken.type, taken.shape) == (
        "tensor(uint8)",
        ["batch", nets.HEIGHT, nets.WIDTH, 3],
    )
    (found,) = session(path).run(["probabilities"], {"images": nets.images()})
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    wanted = nets.softmax(nets.expected(kind))
    bound = {"float32": 1e-5, "float16": 5e-3}[dtype]
    assert nets.relative(nets.log(wanted), nets.log(found)) <= bound
    # Decoders give NHWC: the one transpose, of three channels, behind a cast at the very input.
    assert operators(path)[:4] == ["Cast", "Transpose", "Sub", "Mul"]
    assert operators(path).count("Transpose") == 1


def test_description_travels_along():
    path = nets.artifact("onnx", "se-before").path
    model = onnx.load(path)
    assert (model.producer_name, model.ir_version) == ("repvgg-jax", 8)
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert (props["variant"], props["input_layout"]) == ("tiny", "NCHW")
    assert json.loads(props["image_size"]) == [nets.HEIGHT, nets.WIDTH]
    assert tuple(json.loads(props["labels"])) == nets.LABELS
    assert tuple(json.loads(props["mean"])) == nets.MEAN
    assert tuple(json.loads(props["std"])) == nets.STD
    # The runtime hands them out as well.
    assert session(path).get_modelmeta().custom_metadata_map == props


def test_preprocessing_is_the_one_normalization(tmp_path):
    """Bitwise, in either runtime's graph: a subtraction, then a multiplication, in float32."""
    whole = onnx.load(nets.artifact("onnx", "plain", with_preprocessing=True).path)
    whole.graph.output.add(name="images/factor")
    onnx.save(whole, tmp_path / "model.onnx")
    (found,) = session(tmp_path / "model.onnx").run(["images/factor"], {"images": nets.images()})
    normalize = nets.network("plain").normalize
    np.testing.assert_array_equal(found, nchw(normalize(nets.images())))
    jitted = jax.jit(normalize)(nets.images())
    np.testing.assert_array_equal(jitted, normalize(nets.images()))


def test_weights_beyond_float16_are_named(tmp_path):
    network = nets.fresh("plain")
    network.params["stage2_block1"]["reparam"]["kernel"][0, 0, 0, 0] = 7e4
    with pytest.raises(ValueError, match=r"stage2_block1/reparam/kernel.*7e\+04.*float32"):
        export("onnx", network, tmp_path / "model.onnx", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_another_network_is_never_written(runtime, tmp_path, monkeypatch):
    other = "openvino" if runtime == "onnxruntime" else "onnxruntime"
    monkeypatch.setitem(sys.modules, other, None)
    network = nets.fresh("plain")
    assert network.reference.any()  # the JAX model has answered; only now do its weights change
    kernel = network.params["stage1_block0"]["reparam"]["kernel"]
    kernel[...] = kernel[::-1].copy()
    (tmp_path / "model.onnx").write_text("older")
    with pytest.raises(ValueError, match=f"disagrees.*{runtime}"):
        export("onnx", network, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "older"


@pytest.mark.slow
def test_the_largest_fits_in_4_gib():
    job = {"model": "D2se", "format": "onnx", "dtype": "float32", "image_size": 224, "images": 4}
    result = subprocess.run(
        [sys.executable, "benchmarks/export.py", "--job", json.dumps(job)],
        cwd=Path(__file__).parents[1],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["M params"] > 110
    assert row["relative"] <= 1e-5
    assert row["peak MiB"] < 4096
