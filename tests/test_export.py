"""Exports: what is checked before, what is proven, what is left if something fails."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image
from safetensors import safe_open

from repvgg_jax import create_model, fuse_params
from repvgg_jax.activations import name_of
from repvgg_jax.data.images import CenterCrop
from repvgg_jax.export import FORMATS, Network, Normalize, Target, export, operators, parse_targets
from repvgg_jax.export.decompose import decompose
from repvgg_jax.export.format import checksums
from repvgg_jax.reparam import unfuse_params
from tests.helpers import export_networks as nets

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
ONNX = ("onnx", ("onnx", "onnxruntime", "openvino"))
DOCUMENTED = {
    "Images in, classes out": (None, ()),
    "ONNX Runtime": ONNX,
    "OpenVINO": ONNX,
    "Phones": ("tflite", ("tensorflow", "ai_edge_litert")),
    "TensorFlow": ("savedmodel", ("tensorflow",)),
    "JAX with this package": (None, ()),  # in test_convert.py
    "JAX without this package": ("stablehlo", ()),
    "From Python": ONNX,
    "Modules of your own": (None, ()),  # in test_export_outputs.py
}


def network_of(variables, **options):
    options = {"images": nets.images(), "normalize": Normalize(nets.MEAN, nets.STD), **options}
    return Network(nets.model("plain"), variables, **options)


def fused_plain():
    return fuse_params(nets.variables("plain"))


def test_labels_that_are_not_utf8():
    labels = ("caf\udce9", *nets.LABELS[1:])
    header = network_of(fused_plain(), labels=labels).header("NHWC")
    assert tuple(json.loads(header["labels"].encode())) == labels


@pytest.mark.system
def test_the_room_imports_no_runtime():
    code = """
import sys, repvgg_jax.export
heavy = {"onnx", "onnxruntime", "openvino", "tensorflow", "ai_edge_litert", "torch", "orbax"}
sys.exit(", ".join(sorted(heavy & sys.modules.keys())) or 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class TestFormats:
    """Every format computes what the training form does."""

    # The model itself, whatever its convolutions: not every kind.
    @pytest.mark.parametrize("kind", ["plain", "se-after", "features"])
    def test_stablehlo_is_the_train_form_at_every_batch_size(self, kind):
        network, artifact = nets.network(kind), nets.artifact("stablehlo", kind)
        assert artifact.proofs["jax"].relative <= 1e-5
        exported = jax.export.deserialize(bytearray(artifact.path.read_bytes()))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        found = np.asarray(exported.call(network.images[:7]))  # its proof ran batches of 1 and 16
        assert nets.relative(nets.expected(kind)[:7], found) <= 1e-5

    def test_stablehlo_in_bfloat16_is_the_bfloat16_model(self):
        network = nets.network("se-after")
        full = nets.artifact("stablehlo", "se-after")
        half = nets.artifact("stablehlo", "se-after", "bfloat16")
        exported = jax.export.deserialize(bytearray(half.path.read_bytes()))
        found = np.asarray(exported.call(network.images))
        # One rounding is 4e-3; six layers of them stay within a few times that.
        assert 1e-4 < nets.relative(nets.expected("se-after"), found) <= 3e-2
        assert half.size < 0.8 * full.size

    def test_safetensors_holds_the_very_weights(self):
        artifact = nets.artifact("safetensors", "se-before")
        fused = fuse_params(nets.variables("se-before"))["params"]
        with safe_open(artifact.path, "numpy") as opened:
            assert opened.get_tensor("params/stage2_block0/se/expand/bias").shape == (16,)
            kernel = opened.get_tensor("params/stage2_block0/reparam/kernel")
            assert json.loads(opened.metadata()["labels"]) == list(nets.LABELS)
        np.testing.assert_array_equal(kernel, fused["stage2_block0"]["reparam"]["kernel"])
        assert artifact.identical
        assert not artifact.proofs  # reading back bitwise says more than any logits

    @pytest.mark.parametrize("name", [n for n, form in FORMATS.items() if not form.holds_graph])
    def test_weights_that_are_read_back_differently_are_never_written(self, name, tmp_path):
        """By one bit, which no logits would show."""
        form, network = FORMATS[name], nets.network("plain")

        def write_another(network, path, dtype):
            params = jax.tree.map(np.array, network.params)
            params["stem"]["reparam"]["bias"].view(np.uint32)[0] ^= 1
            other = Network(
                network.model,
                {"params": params},
                images=network.images,
                normalize=network.normalize,
            )
            form.write(other, path, dtype)

        damaged = Target(dataclasses.replace(form, write=write_another), "float32")
        with pytest.raises(ValueError, match=f"{name}.*stem/reparam/bias"):
            damaged.write(network, tmp_path / form.filename)
        assert Target(form, "float32").write(network, tmp_path / f"2.{form.filename}").identical


class TestArtifacts:
    """What `export` leaves and returns."""

    def test_it_says_what_it_is(self, tmp_path):
        network = nets.network("plain")
        artifact = export("stablehlo", network, tmp_path / "new" / "model.stablehlo")
        blob = artifact.path.read_bytes()
        content = json.loads(json.dumps(artifact.as_dict()))
        assert content["sha256"] == hashlib.sha256(blob).hexdigest()
        assert artifact.checksums == {"model.stablehlo": content["sha256"]}
        assert content["size"] == len(blob)
        assert content["status"] == "proven"
        assert content["proofs"]["jax"]["images"] == len(network.images)
        assert content["proofs"]["jax"]["holds"] is True
        assert content["versions"]["jax"] == jax.__version__
        assert content["description"]["labels"] == list(nets.LABELS)
        assert "proven with jax" in str(artifact)
        assert [path.name for path in artifact.path.parent.iterdir()] == ["model.stablehlo"]

    def test_a_directory_replaces_its_like_and_nothing_else(self, tmp_path):
        network = nets.network("plain")
        first = export("orbax", network, tmp_path / "weights")
        (first.path / "leftover").write_text("of the older one")
        again = export("orbax", network, first.path)
        assert not (again.path / "leftover").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["weights"]
        assert again.checksums == checksums(again.path)
        lines = "".join(
            f"{sha}  {name.removeprefix('weights/')}\n" for name, sha in again.checksums.items()
        )
        assert again.sha256 == hashlib.sha256(lines.encode()).hexdigest()
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").write_text("do not lose")
        with pytest.raises(ValueError, match=r"mine.*orbax"):
            export("orbax", network, mine)
        assert (mine / "thesis.txt").exists()

    def test_without_its_runtime_it_is_unproven_and_says_so(self, tmp_path, monkeypatch):
        pytest.importorskip("onnx", reason="needs requirements-onnx.txt")
        for runtime in ("onnxruntime", "openvino"):
            monkeypatch.setitem(sys.modules, runtime, None)
        artifact = export("onnx", nets.network("plain"), tmp_path / "model.onnx")
        assert not artifact.proven
        assert artifact.unproven.keys() == {"onnxruntime", "openvino"}
        assert artifact.as_dict()["status"] == "UNPROVEN"
        head, *rest = str(artifact).splitlines()
        assert head.endswith("UNPROVEN")
        assert rest[1].endswith("pip install -r requirements-onnx.txt")

    @pytest.mark.parametrize(
        ("name", "module"),
        [("onnx", "onnx"), ("tflite", "tensorflow"), ("savedmodel", "tensorflow")],
    )
    def test_without_its_package_a_format_names_the_remedy(
        self, name, module, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, module, None)
        remedy = re.escape(FORMATS[name].remedy)
        with pytest.raises(ValueError, match=f"{name}: .*{module}.*; {remedy}$"):
            export(name, nets.network("plain"), tmp_path / "new" / FORMATS[name].filename)
        assert not list((tmp_path / "new").iterdir())

    def test_a_graph_that_disagrees_is_never_written(self, tmp_path):
        network = nets.fresh("plain")
        assert network.reference.any()  # the JAX model's outputs; only now do its weights change
        network.params["stem"]["reparam"]["bias"][0] += 0.01
        (tmp_path / "model").write_text("older")
        with pytest.raises(ValueError, match="disagrees with the JAX model"):
            export("stablehlo", network, tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (tmp_path / "model").read_text() == "older"

    def test_weights_alone_cannot_hold_preprocessing(self, tmp_path):
        network = nets.network("plain", with_preprocessing=True)
        with pytest.raises(ValueError, match=r"safetensors .*preprocessing"):
            export("safetensors", network, tmp_path / "model.safetensors")

    def test_a_path_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            export("stablehlo", nets.network("plain"), tmp_path / "file" / "model")
        with pytest.raises(ValueError, match="is a directory"):
            export("stablehlo", nets.network("plain"), tmp_path)


class TestTargets:
    """`--format`, parsed once."""

    @pytest.mark.parametrize(
        ("text", "filename", "dtype"),
        [
            ("onnx", "model.onnx", "float32"),
            ("onnx:float16", "model.float16.onnx", "float16"),
            ("stablehlo:bfloat16", "model.bfloat16.stablehlo", "bfloat16"),
            ("savedmodel", "savedmodel", "float32"),
            ("torch-timm", "model.timm.safetensors", "float32"),
        ],
    )
    def test_a_format_with_its_dtype(self, text, filename, dtype):
        target = Target.parse(text)
        assert (target.filenames[0], target.dtype) == (filename, dtype)

    def test_pth_is_written_if_torch_is_installed(self, monkeypatch):
        also = dataclasses.replace(FORMATS["torch-timm"], also={"a.pth": "json", "b": "no_such"})
        assert Target(also, "float32").filenames == ("model.timm.safetensors", "a.pth")

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["onx"], "'onx'.*'onnx'"),
            (["torch"], "'torch'.*torch-"),
            (["onnx", "tflite:int8"], "tflite .*'int8'.*float32, float16"),
            (["onnx:bfloat16"], "onnx .*'bfloat16'.*float32, float16"),
            (["orbax:float16"], "orbax .*'float16'.*float32"),
            ([], "no format.*orbax"),
        ],
    )
    def test_what_is_no_target(self, texts, message):
        with pytest.raises(ValueError, match=message):
            parse_targets(texts)

    def test_repetitions_are_written_once(self):
        targets = parse_targets(["onnx", "onnx:float16", "onnx:float32"])
        assert [target.dtype for target in targets] == ["float32", "float16"]


class TestNetworks:
    """What is checked before anything is written."""

    def test_variables_in_training_form_are_refused(self):
        with pytest.raises(ValueError, match=r"training form.*fuse_params"):
            network_of(nets.variables("plain"))

    def test_a_train_form_that_was_unfused_exports_like_its_source(self):
        fused = fused_plain()
        again = fuse_params(unfuse_params(fused, like=nets.variables("plain")))
        assert nets.relative(network_of(fused).reference, network_of(again).reference) <= 1e-5

    def test_variables_of_another_network_are_refused(self):
        fused = fused_plain()["params"]
        with pytest.raises(ValueError, match=r"tiny.*missing \[stem/reparam/bias"):
            network_of({"params": {k: v for k, v in fused.items() if k != "stem"}})
        with pytest.raises(ValueError, match=r"stage1_block1/reparam/kernel.*\(3, 3, 2, 8\)"):
            network_of(fuse_params(nets.variables("grouped")))
        with pytest.raises(ValueError, match=r"'params'.*head"):
            network_of(fused)
        more = {name: leaf[..., :4] for name, leaf in fused["head"].items()}
        with pytest.raises(ValueError, match=r"num_classes=5.* 4 classes"):
            network_of({"params": {**fused, "head": more}})

    def test_weights_that_are_not_finite_are_refused(self):
        fused = fused_plain()
        fused["params"]["stage1_block1"]["reparam"]["bias"][3] = np.inf
        with pytest.raises(ValueError, match=r"stage1_block1/reparam/bias.*NaN"):
            network_of(fused)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"images": np.zeros((0, 24, 24, 3), np.uint8)}, r"\(0, 24, 24, 3\)"),
            ({"images": np.zeros((24, 24, 3), np.uint8)}, r"\(24, 24, 3\)"),
            ({"images": np.zeros((1, 24, 24, 3), np.int32)}, "int32.*uint8"),
            ({"normalize": Normalize((0.5, 0.5), (1, 1))}, "2 channels.* have 3"),
            ({"labels": ("a", "b")}, "2 labels.* 5 classes"),
            (
                {"images": np.zeros((1, 24, 24, 3), np.float32), "with_preprocessing": True},
                "float32.*uint8",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            network_of(fused_plain(), **options)

    def test_one_mean_serves_all_channels(self):
        network = network_of(fused_plain(), normalize=Normalize([0.4], [0.2]))
        np.testing.assert_allclose(network.images, (nets.images() / 255 - 0.4) / 0.2, atol=1e-6)

    @pytest.mark.parametrize("count", [1, 2, 17, 19, 40])
    def test_answers_cover_every_image_in_several_batch_sizes(self, count):
        network = network_of(
            fused_plain(),
            images=np.arange(count * 24 * 24 * 3, dtype=np.float32).reshape(count, 24, 24, 3),
        )
        sizes = []

        def run(images):
            sizes.append(len(images))
            return images[:, 0, 0]

        np.testing.assert_array_equal(network.answers(run), network.images[:, 0, 0])
        assert sizes[0] == 1
        assert max(sizes) == min(max(count - 1, 1), 16)

    def test_the_form_and_dtype_of_the_model_do_not_matter(self):
        fused = fused_plain()
        options = {"images": nets.images(), "normalize": Normalize(nets.MEAN, nets.STD)}
        deploy = create_model(nets.variant(), num_classes=5, deploy=True, dtype=jax.numpy.bfloat16)
        np.testing.assert_array_equal(
            Network(deploy, fused, **options).reference, network_of(fused).reference
        )


class TestOperators:
    """What exporters know about a block."""

    def test_shapes_come_from_the_kernel_and_the_block(self):
        network = nets.network("dilated")
        convs = [op for op in decompose(network) if isinstance(op, operators.Conv)]
        assert [conv.name for conv in convs][:2] == ["stem/reparam", "stage1_block0/reparam"]
        for conv, layer in zip(convs, network.model.layers, strict=True):
            assert conv.kernel_size == (3, 3)
            assert (conv.stride, conv.dilation) == (layer.stride, layer.dilation)
            assert (conv.groups, conv.padding) == (layer.groups, (layer.dilation,) * 2)
        assert {conv.dilation for conv in convs} == {1, 2, 4}
        bias = np.zeros(4)
        large = operators.Conv("x", np.zeros((5, 1, 4, 4)), bias, stride=1, dilation=3, groups=1)
        assert large.padding == (6, 0)

    def test_an_activation_without_an_operator_is_named(self, tmp_path):
        known = [name_of(function, "stem") for function in (nn.relu, jax.nn.silu, None)]
        assert known == ["relu", "silu", None]
        network = Network(
            nets.model("plain").clone(activation=nn.gelu),
            fused_plain(),
            images=nets.images(),
            normalize=Normalize(nets.MEAN, nets.STD),
        )
        with pytest.raises(ValueError, match=r"stem.*gelu"):
            decompose(network)
        # Which StableHLO does not need.
        assert export("stablehlo", network, tmp_path / "model.stablehlo").proven


class TestDocs:
    """docs/deploy.md does what it says, word for word."""

    def test_every_section_with_python_is_tested(self):
        sections = re.findall(r"^## (.*)$", PAGE, re.M)
        assert [name for name in sections if nets.documented(name)] == list(DOCUMENTED)

    @pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # short examples
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_from_files(self, channels, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("deploy").mkdir()
        about = {"image_shape": [24, 32, channels], "crop": {"fraction": 0.7}}
        Path("deploy/metadata.json").write_text(json.dumps(about))
        tall = Image.fromarray(nets.images()[0]).resize((49, 67))
        wide = tall.resize((97, 53))
        tall.save("tall.png")
        wide.save("wide.png")
        given = {"paths": ["tall.png", "wide.png"]}
        (block,) = nets.documented("Images in, classes out")
        exec(compile(block, "docs/deploy.md", "exec"), given)
        assert given["images"].shape == (2, 24, 32, channels)
        assert given["images"].dtype == np.uint8
        evaluation = CenterCrop((24, 32), 0.7)
        for image, picture in zip(given["images"], (tall, wide), strict=True):
            pixels = np.asarray(picture if channels == 3 else picture.convert("L"))
            pixels = pixels.reshape(*pixels.shape[:2], channels)
            np.testing.assert_array_equal(image, evaluation({"image": pixels}))

    def test_the_table_lists_every_format(self):
        rows = re.findall(r"^\| `([\w-]+)` \| `(\S+?)/?` \|.*?\| (.*?) ?\|$", PAGE, re.M)
        wanted = [
            (form.name, form.filename, f"`{form.remedy}`" if form.extra else "")
            for form in FORMATS.values()
        ]
        assert rows == wanted

    @pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # short examples
    @pytest.mark.parametrize("section", [name for name, (form, _) in DOCUMENTED.items() if form])
    def test_the_examples_answer_like_the_train_form(self, section, tmp_path, monkeypatch):
        name, modules = DOCUMENTED[section]
        for module in modules:
            extra = FORMATS[name].extra
            pytest.importorskip(module, reason=f"needs requirements-{extra}.txt")
        monkeypatch.chdir(tmp_path)
        network = nets.network("plain")
        if section != "From Python":
            written = nets.artifact(name, "plain").path
            Path("deploy").mkdir()
            Path("deploy", FORMATS[name].filename).symlink_to(written)
            about = {"mean": nets.MEAN, "std": nets.STD}
            Path("deploy", "metadata.json").write_text(json.dumps(about))
        given = {
            "images": nets.images(),
            "network": network,
            **{"variant": nets.variant(), "variables": nets.variables("plain")},
            **{"mean": nets.MEAN, "std": nets.STD, "labels": nets.LABELS},
        }
        for block in nets.documented(section):
            exec(compile(block, f"docs/deploy.md, {section}", "exec"), given)
        if section == "From Python":
            written = sorted(path.name for path in Path("bytes").iterdir())
            assert written == ["model.onnx", "model.stablehlo"]
        else:
            assert isinstance(given["logits"], np.ndarray)
            assert nets.relative(nets.expected("plain"), given["logits"]) <= 1e-5
