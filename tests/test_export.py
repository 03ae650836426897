"""Exports as such: what is checked before, what is proven, what is left when something fails."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from repvgg_jax import create_model, fuse_params
from repvgg_jax.export import FORMATS, Metadata, Network, export, exporting, parse_format
from repvgg_jax.reparam import unfuse_params
from tests import export_networks as nets


def test_the_room_imports_no_runtime():
    code = """
import sys, repvgg_jax.export
heavy = {"onnx", "onnxruntime", "openvino", "tensorflow", "ai_edge_litert"}
sys.exit(", ".join(sorted(heavy & sys.modules.keys())) or 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize("kind", nets.KINDS)
def test_stablehlo_is_the_train_form_at_every_batch_size(kind):
    network, artefact = nets.network(kind), nets.artefact("stablehlo", kind)
    assert artefact.proofs["jax"].relative <= 1e-5
    exported = jax.export.deserialize(bytearray(artefact.path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for count in (1, 7):
        found = np.asarray(exported.call(network.images[:count]))
        assert nets.relative(nets.expected(kind)[:count], found) <= 1e-5


def test_stablehlo_in_bfloat16_is_the_bfloat16_model():
    network = nets.network("se-after")
    full = nets.artefact("stablehlo", "se-after")
    half = nets.artefact("stablehlo", "se-after", "bfloat16")
    exported = jax.export.deserialize(bytearray(half.path.read_bytes()))
    found = np.asarray(exported.call(network.images))
    # One rounding is 4e-3; six layers of them stay within a few times that.
    assert 1e-4 < nets.relative(nets.expected("se-after"), found) <= 3e-2
    assert half.size < 0.8 * full.size


def test_stablehlo_with_preprocessing():
    path = nets.artefact("stablehlo", "plain", with_preprocessing=True).path
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    found = np.asarray(exported.call(nets.images()))
    wanted = nets.softmax(nets.expected("plain"))
    assert nets.relative(nets.log(wanted), nets.log(found)) <= 1e-5


def test_safetensors_holds_the_very_weights(tmp_path):
    network = nets.network("se-before")
    path = export("safetensors", network, tmp_path / "model.safetensors").path
    fused = fuse_params(nets.variables("se-before"))["params"]
    with safe_open(path, "numpy") as opened:
        assert opened.get_tensor("params/stage2_block0/se/expand/bias").shape == (16,)
        kernel = opened.get_tensor("params/stage2_block0/reparam/kernel")
        assert json.loads(opened.metadata()["labels"]) == list(nets.LABELS)
    np.testing.assert_array_equal(kernel, fused["stage2_block0"]["reparam"]["kernel"])


def test_the_artefact_says_what_it_is(tmp_path):
    network = nets.network("plain")
    artefact = export("stablehlo", network, tmp_path / "new" / "model.stablehlo")
    blob = artefact.path.read_bytes()
    content = json.loads(json.dumps(artefact.as_dict()))
    assert content["sha256"] == hashlib.sha256(blob).hexdigest()
    assert content["size"] == len(blob)
    assert content["status"] == "proven"
    assert content["proofs"]["jax"]["images"] == len(network.images)
    assert content["proofs"]["jax"]["holds"] is True
    assert content["versions"]["jax"] == jax.__version__
    assert content["description"]["labels"] == list(nets.LABELS)
    assert "proven with jax" in str(artefact)
    assert [path.name for path in artefact.path.parent.iterdir()] == ["model.stablehlo"]


def test_checksum_of_a_directory_depends_on_names_and_contents(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("1")
    first = exporting.checksum(tmp_path)
    (tmp_path / "b" / "c").rename(tmp_path / "b" / "d")
    second = exporting.checksum(tmp_path)
    (tmp_path / "b" / "d").write_text("2")
    assert len({first, second, exporting.checksum(tmp_path)}) == 3
    lines = f"{hashlib.sha256(b'2').hexdigest()}  b/d\n"
    assert exporting.checksum(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_without_its_runtime_an_artefact_is_unproven_and_says_so(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason='needs pip install "repvgg-jax[onnx]"')
    for runtime in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, runtime, None)
    artefact = export("onnx", nets.network("plain"), tmp_path / "model.onnx")
    assert not artefact.proven
    assert artefact.unproven.keys() == {"onnxruntime", "openvino"}
    assert artefact.as_dict()["status"] == "UNPROVEN"
    head, *rest = str(artefact).splitlines()
    assert head.endswith("UNPROVEN")
    assert "NOT PROVEN with openvino: " in rest[1]
    assert rest[1].endswith('pip install "repvgg-jax[onnx]"')


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("onnx", "onnx", "onnx"), ("tflite", "tensorflow", "tf"), ("savedmodel", "tensorflow", "tf")],
)
def test_without_its_package_a_format_names_the_remedy(name, module, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    remedy = rf'format {name}: .*{module}.*; pip install "repvgg-jax\[{extra}\]"$'
    with pytest.raises(ValueError, match=remedy):
        export(name, nets.network("plain"), tmp_path / "new" / FORMATS[name].filename)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["safetensors", "stablehlo"])
def test_an_artefact_that_disagrees_is_never_written(name, tmp_path):
    network = nets.fresh("plain")
    assert network.reference.any()  # the JAX model has answered; only now do its weights change
    network.params["stem"]["reparam"]["bias"] += 0.01
    with pytest.raises(ValueError, match=r"disagrees with the JAX model: max .* was not written"):
        export(name, network, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_nan_answers_never_prove_anything(tmp_path):
    network = nets.fresh("plain")
    assert network.reference.any()
    network.params["stem"]["reparam"]["bias"][0] = np.nan
    with pytest.raises(ValueError, match="disagrees"):
        export("stablehlo", network, tmp_path / "model")


def test_an_unknown_format_is_guessed_at(tmp_path):
    with pytest.raises(ValueError, match=r"unknown format 'onx'; did you mean onnx\? There are"):
        export("onx", nets.network("plain"), tmp_path / "model.onnx")


def test_an_unknown_type_lists_the_known_ones(tmp_path):
    wrong = "format onnx cannot compute in 'bfloat16'; it has float32, float16"
    with pytest.raises(ValueError, match=wrong):
        export("onnx", nets.network("plain"), tmp_path / "model.onnx", dtype="bfloat16")


@pytest.mark.parametrize(
    ("text", "filename", "dtype"),
    [
        ("onnx", "model.onnx", "float32"),
        ("onnx:float16", "model.float16.onnx", "float16"),
        ("stablehlo:bfloat16", "model.bfloat16.stablehlo", "bfloat16"),
        ("savedmodel", "savedmodel", "float32"),
    ],
)
def test_formats_are_asked_for_with_their_type(text, filename, dtype):
    form, found = parse_format(text)
    assert (form.filename_in(found), found) == (filename, dtype)


def test_a_format_asked_for_in_a_type_that_it_lacks():
    with pytest.raises(ValueError, match="tflite cannot compute in 'int8'; it has float32, float"):
        parse_format("tflite:int8")


def test_weights_alone_cannot_hold_preprocessing(tmp_path):
    network = nets.network("plain", with_preprocessing=True)
    with pytest.raises(ValueError, match="safetensors holds weights and no graph"):
        export("safetensors", network, tmp_path / "model.safetensors")


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*model: Not a directory|File exists"):
        export("stablehlo", nets.network("plain"), tmp_path / "file" / "model")
    with pytest.raises(ValueError, match="is a directory; format stablehlo writes a file"):
        export("stablehlo", nets.network("plain"), tmp_path)


def network_of(variables, **options):
    options = {"images": nets.images(), "metadata": Metadata(nets.MEAN, nets.STD), **options}
    return Network(nets.model("plain"), variables, **options)


def test_variables_of_the_train_form_are_refused():
    with pytest.raises(ValueError, match=r"6 blocks .* in training form; .* fuse_params first"):
        network_of(nets.variables("plain"))


def test_a_train_form_that_was_unfused_exports_like_its_source():
    fused = fuse_params(nets.variables("plain"))
    again = fuse_params(unfuse_params(fused, like=nets.variables("plain")))
    assert nets.relative(network_of(fused).reference, network_of(again).reference) <= 1e-5


def test_variables_of_another_network_are_refused():
    fused = fuse_params(nets.variables("plain"))["params"]
    with pytest.raises(ValueError, match=r"tiny in deploy form: missing \[stem/reparam/bias"):
        network_of({"params": {k: v for k, v in fused.items() if k != "stem"}})
    with pytest.raises(
        ValueError, match=r"stage1_block1/reparam/kernel: shape \(3, 3, 2, 8\), exp"
    ):
        network_of(fuse_params(nets.variables("grouped")))
    with pytest.raises(ValueError, match="export takes deploy-form variables"):
        network_of(fused)


def test_weights_that_are_not_finite_are_refused():
    fused = fuse_params(nets.variables("plain"))
    fused["params"]["stage1_block1"]["reparam"]["bias"][3] = np.inf
    with pytest.raises(ValueError, match="stage1_block1/reparam/bias holds NaN or infinite"):
        network_of(fused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": np.zeros((0, 24, 24, 3), np.uint8)}, "at least one real image"),
        ({"images": np.zeros((24, 24, 3), np.uint8)}, "at least one real image"),
        ({"images": np.zeros((1, 24, 24, 3), np.int32)}, "int32; expected uint8 or normalised"),
        ({"metadata": Metadata((0.5, 0.5), (1, 1))}, "means of 2 channels, but .* have 3"),
        ({"metadata": Metadata(nets.MEAN, nets.STD, ("a", "b"))}, "2 labels for .* 5 classes"),
        (
            {"images": np.zeros((1, 24, 24, 3), np.float32), "with_preprocessing": True},
            "float32; expected uint8 numbers",
        ),
    ],
)
def test_images_and_metadata_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network_of(fuse_params(nets.variables("plain")), **options)


@pytest.mark.parametrize("mean_std", [((0.5,), (0.2, 0.2)), ((), ()), ((0.5,), (0.0,))])
def test_metadata_that_makes_no_sense_is_refused(mean_std):
    with pytest.raises(ValueError, match="metadata: "):
        Metadata(*mean_std)


def test_one_mean_serves_all_channels():
    network = network_of(
        fuse_params(nets.variables("plain")), metadata=Metadata([0.4], [0.2]), images=nets.images()
    )
    np.testing.assert_allclose(network.images, (nets.images() / 255 - 0.4) / 0.2, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 17, 19, 40])
def test_answers_cover_every_image_in_several_batch_sizes(count):
    network = network_of(
        fuse_params(nets.variables("plain")),
        images=np.arange(count * 24 * 24 * 3, dtype=np.float32).reshape(count, 24, 24, 3),
    )
    sizes = []

    def run(images):
        sizes.append(len(images))
        return images[:, 0, 0]

    np.testing.assert_array_equal(network.answers(run), network.images[:, 0, 0])
    assert sizes[0] == 1
    assert max(sizes) == min(max(count - 1, 1), 16)


def test_normalised_images_and_bytes_are_the_same():
    fused = fuse_params(nets.variables("plain"))
    normalised = ((nets.images() / 255 - np.asarray(nets.MEAN)) / nets.STD).astype(np.float32)
    both = [network_of(fused, images=images) for images in (normalised, nets.images())]
    assert nets.relative(both[0].reference, both[1].reference) <= 1e-5


def test_the_form_and_type_of_the_model_do_not_matter():
    fused = fuse_params(nets.variables("plain"))
    options = {"images": nets.images(), "metadata": Metadata(nets.MEAN, nets.STD)}
    deploy = create_model(nets.variant(), num_classes=5, deploy=True, dtype=jax.numpy.bfloat16)
    np.testing.assert_array_equal(
        Network(deploy, fused, **options).reference, network_of(fused).reference
    )
