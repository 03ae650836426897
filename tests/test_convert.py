"""Conversions: from a run or a checkpoint to a deploy directory that is proven and verified."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import stat

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import linen as nn

from repvgg_jax import create_model, files, fuse_params, load_weights, save_weights, to_state_dict
from repvgg_jax.classifier import center_crop
from repvgg_jax.convert import command
from repvgg_jax.convert.deployed import load_deployed
from repvgg_jax.convert.metadata import Crop
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import Facts, crop_of, from_run, from_weights
from repvgg_jax.data.dataset import load
from repvgg_jax.export import FORMATS, Normalize, Target, export, parse_targets
from repvgg_jax.export.description import read_description
from repvgg_jax.model import RepVGG
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.experiment import build_model
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import TrainState
from repvgg_jax.train.workdir import RunMetadata, Workdir
from tests.helpers import export_networks as nets
from tests.helpers.commands import ROOT, check_one_line, run
from tests.helpers.runs import small_settings
from tests.helpers.trees import random_variables

OLD = ROOT / "tests" / "data" / "v0.1-0164ae8"  # a run and a deploy directory of that commit
DEFAULT = parse_targets(["orbax", "safetensors"])


@pytest.fixture(scope="module")
def deploy(tmp_path_factory):
    """A deploy directory of the default formats; tests that change it copy it."""
    path = tmp_path_factory.mktemp("converted") / "deploy"
    convert(nets.source(), Output(path), targets=DEFAULT)
    return path


class TestConvert:
    """The pipeline."""

    @pytest.mark.parametrize("kind", ["features", "silu"])
    def test_what_was_written_is_the_trained_network(self, kind, tmp_path):
        done = convert(nets.source(kind), Output(tmp_path / "deploy"), targets=DEFAULT)
        assert done.proof is not None
        assert done.proof.holds
        assert done.proof.images == len(nets.images())
        deployed = load_deployed(tmp_path / "deploy")
        chex.assert_trees_all_equal(deployed.variables, fuse_params(nets.variables(kind)))
        images = nets.source().normalize(nets.images())
        found = np.asarray(jax.jit(deployed.model.apply)(deployed.variables, images))
        assert nets.relative(nets.expected(kind), found) <= 1e-5
        assert sorted(path.name for path in tmp_path.iterdir()) == ["deploy"]

        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            deployed.variables,
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "deploy" / "orbax", abstract)
        chex.assert_trees_all_equal(restored, deployed.variables)

    def test_each_form_is_compiled_once(self, tmp_path):
        """Its proof and its timing share the program."""
        traced = []

        class Counted(RepVGG):
            def apply(self, variables, images, **options):
                if self.lowering == "auto":  # artifacts have their own, plain network
                    traced.append(self.deploy)
                return super().apply(variables, images, **options)

        model = nets.model("plain")
        fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(RepVGG)}
        counted = nets.source(model=Counted(**fields))
        done = convert(counted, Output(tmp_path / "deploy"), targets=DEFAULT)
        assert sorted(traced) == [False, True]
        assert all(speed > 0 for speed in done.images_per_second)

    def test_variables_of_other_classes(self, tmp_path):
        other = nets.source(model=nets.model("plain").clone(num_classes=9), labels=())
        with pytest.raises(ValueError, match=r"num_classes=9.* 5 classes"):
            convert(other, Output(tmp_path / "deploy"), targets=DEFAULT)
        assert not list(tmp_path.iterdir())

    def test_each_file_is_hashed_once(self, tmp_path, monkeypatch):
        hashed = []
        sha256 = files.sha256

        def counted(path):
            hashed.append(path.name)
            return sha256(path)

        monkeypatch.setattr(files, "sha256", counted)
        convert(nets.source(), Output(tmp_path / "deploy"), targets=parse_targets(["safetensors"]))
        assert sorted(hashed) == ["metadata.json", "model.safetensors"]

    def test_files_are_readable_by_others(self, tmp_path):
        """Also those of safetensors, whose writer makes them private."""
        before = os.umask(0o027)
        try:
            convert(nets.source(), Output(tmp_path / "deploy"), targets=DEFAULT)
            own = {"family": "flax", "variant": nets.model("plain").variant}
            save_weights(tmp_path / "w.safetensors", nets.variables("plain"), **own)
        finally:
            os.umask(before)
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {"model.safetensors", "w.safetensors"} <= {path.name for path in written}
        assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in written} == {"0o640"}

    def test_files_say_what_they_are(self, deploy):
        metadata = json.loads((deploy / "metadata.json").read_text())
        assert metadata["classes"] == list(nets.LABELS)
        assert (metadata["mean"], metadata["std"]) == (list(nets.MEAN), list(nets.STD))
        assert metadata["image_shape"] == [nets.HEIGHT, nets.WIDTH, 3]
        assert metadata["source"] == {"weights": "none"}
        assert metadata["versions"].keys() >= {"jax", "flax", "repvgg-jax"}
        proof = json.loads((deploy / "proof.json").read_text())
        assert proof["fused"]["holds"] is True
        assert proof["fused"]["relative"] <= proof["fused"]["tolerance"] == 1e-5
        assert [
            (artifact["format"], artifact["status"], artifact["same_bits"], artifact["files"])
            for artifact in proof["artefacts"]
        ] == [
            ("orbax", "proven", True, ["orbax"]),
            ("safetensors", "proven", True, ["model.safetensors"]),
        ]
        there = {file for file in deploy.rglob("*") if file.is_file()}
        listed = {deploy / name for name in proof["sha256"]}
        assert there - listed == {deploy / "proof.json"}
        assert listed <= there

    def test_keys_on_disk_stay(self, deploy):
        """Everything that 0164ae8 wrote is still written."""
        for name in ("metadata.json", "proof.json"):
            old = json.loads((OLD / "deploy" / name).read_text())
            new = json.loads((deploy / name).read_text())
            assert old.keys() <= new.keys()
            if name == "proof.json":
                for before, now in zip(old["artefacts"], new["artefacts"], strict=False):
                    assert before.keys() <= now.keys()
                    assert before.get("description", {}).keys() <= now["description"].keys()

    def test_preprocessing_is_in_graphs_and_not_in_weights(self, tmp_path):
        output = Output(tmp_path / "deploy")
        targets = parse_targets(["stablehlo", "safetensors"])
        convert(nets.source(), output, targets=targets, with_preprocessing=True)
        blob = (output.path / "model.stablehlo").read_bytes()
        found = np.asarray(jax.export.deserialize(bytearray(blob)).call(nets.images()))
        wanted = nets.softmax(nets.expected("plain"))
        assert nets.relative(nets.log(wanted), nets.log(found)) <= 1e-5
        proof = json.loads((output.path / "proof.json").read_text())
        kinds = [artifact["description"]["input_dtype"] for artifact in proof["artefacts"]]
        assert kinds == ["uint8", "float32"]

    def test_feature_maps_and_dynamic_sizes_are_of_graphs(self, tmp_path):
        output = Output(tmp_path / "deploy")
        targets = parse_targets(["stablehlo", "safetensors"])
        convert(nets.source(), output, targets=targets, feature_maps=["stage2"], dynamic_size=True)
        call = jax.export.deserialize(bytearray((output.path / "model.stablehlo").read_bytes()))
        assert call.call(np.zeros((2, 40, 17, 3), np.float32))["stage2"].shape == (2, 5, 3, 16)
        assert load_deployed(output.path).model.num_classes == len(nets.LABELS)
        other = Output(tmp_path / "other")
        with pytest.raises(ValueError, match=r"tflite .*stablehlo, onnx"):
            convert(nets.source(), other, targets=parse_targets(["tflite"]), dynamic_size=True)
        assert not other.path.exists()

    def test_a_fused_source_is_written_as_it_is(self, tmp_path):
        fused = fuse_params(nets.variables("plain"))
        given = nets.source(model=nets.model("plain").clone(deploy=True), variables=fused)
        done = convert(given, Output(tmp_path / "deploy"), targets=DEFAULT)
        assert done.proof is None
        assert "proof: none" in done.table()
        assert "\nproof images" not in done.table()
        deployed = load_deployed(tmp_path / "deploy")
        assert deployed.proof["fused"] is None
        chex.assert_trees_all_equal(deployed.variables, fused)

    def test_a_failed_proof_writes_nothing_and_keeps_what_was_there(self, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        with pytest.raises(ValueError, match=r"> 1e-12"):
            convert(nets.source(), Output(tmp_path / "deploy"), targets=DEFAULT, tolerance=1e-12)
        with pytest.raises(ValueError, match=r"nothing was written"):
            convert(nets.source(), Output(tmp_path / "new"), targets=DEFAULT, tolerance=1e-12)
        assert [path.name for path in tmp_path.iterdir()] == ["deploy"]
        load_deployed(tmp_path / "deploy")

    def test_an_artifact_that_fails_leaves_nothing(self, tmp_path):
        def write(network, path, dtype):
            path.write_text("half of it")
            raise ValueError("no more ink")

        broken = Target(dataclasses.replace(FORMATS["stablehlo"], write=write), "float32")
        with pytest.raises(ValueError, match="ink"):
            convert(nets.source(), Output(tmp_path / "deploy"), targets=[*DEFAULT, broken])
        assert not list(tmp_path.iterdir())

    def test_an_activation_that_cannot_be_read_back(self, tmp_path):
        given = nets.source(model=nets.model("plain").clone(activation=nn.gelu))
        with pytest.raises(ValueError, match="gelu"):
            convert(given, Output(tmp_path / "deploy"), targets=DEFAULT)
        assert not list(tmp_path.iterdir())

    def test_a_tolerance_that_nothing_meets(self, tmp_path):
        with pytest.raises(ValueError, match="tolerance=0"):
            convert(nets.source(), Output(tmp_path / "deploy"), targets=DEFAULT, tolerance=0)


class TestOutput:
    """Where a conversion may write."""

    def test_nothing_there_or_an_earlier_conversion(self, deploy, tmp_path):
        (tmp_path / "empty").mkdir()
        for path in (deploy, tmp_path / "empty", tmp_path / "new"):
            assert Output(path).path == path

    def test_what_is_not_ours_is_left_alone(self, tmp_path):
        (tmp_path / "letter.txt").write_text("x")
        with pytest.raises(ValueError, match=r"letter\.txt.*--output"):
            Output(tmp_path)
        with pytest.raises(ValueError, match=r"letter\.txt is a file"):
            Output(tmp_path / "letter.txt")
        assert (tmp_path / "letter.txt").read_text() == "x"

    def test_what_a_killed_conversion_left_is_removed(self, deploy, tmp_path):
        """Not what another process is writing at the moment, and nothing of another output."""
        for name in (".out.0123abcd", ".out.0123abce", ".other.0123abcd"):
            shutil.copytree(deploy, tmp_path / name)
        held = os.open(tmp_path / ".out.0123abce", os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        with Output(tmp_path / "out").writing() as directory:
            (directory / "x").touch()
        os.close(held)
        left = {entry.name for entry in tmp_path.iterdir()}
        assert left == {"out", ".out.0123abce", ".other.0123abcd"}

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_is_followed(self, tmp_path, there):
        if there:
            (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to("disk")
        with Output(tmp_path / "out").writing() as directory:
            (directory / "x").touch()
        assert (tmp_path / "out").is_symlink()
        assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["x"]

    def test_killed_between_two_renames(self, deploy, tmp_path):
        """Where a file system cannot exchange them. The next conversion begins with the old one."""
        shutil.copytree(deploy, tmp_path / ".out.0123abcd.old")
        with pytest.raises(ValueError, match=r"\.out\.0123abcd\.old"):
            load_deployed(tmp_path / "out")
        with pytest.raises(OSError, match="ink"), Output(tmp_path / "out").writing():
            raise OSError("no more ink")
        load_deployed(tmp_path / "out")
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


class TestEarlierConversion:
    """What stays when another conversion takes its place."""

    def test_formats_of_the_same_weights_stay(self, deploy, tmp_path):
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        before = load_deployed(path)
        done = convert(nets.source(), Output(path), targets=parse_targets(["stablehlo"]))
        assert {"orbax", "model.safetensors", "model.stablehlo"} <= set(os.listdir(path))
        assert "kept: orbax, of the same weights" in done.table()
        after = load_deployed(path)  # which verifies all files that are listed
        chex.assert_trees_all_equal(after.variables, before.variables)
        listed = [entry["format"] for entry in after.proof["artefacts"]]
        assert listed == ["stablehlo", "orbax", "safetensors"]
        assert "orbax/_METADATA" in after.proof["sha256"]
        # Again: a format that is written anew appears once.
        convert(nets.source(), Output(path), targets=parse_targets(["stablehlo"]))
        assert len(load_deployed(path).proof["artefacts"]) == 3

    def test_formats_of_other_weights_go(self, deploy, tmp_path):
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        variables = jax.tree.map(np.copy, nets.variables("plain"))
        variables["params"]["head"]["bias"][0] += 1e-6
        given, targets = nets.source(variables=variables), parse_targets(["safetensors"])
        done = convert(given, Output(path), targets=targets)
        assert "removed: orbax, of another network" in done.table()
        assert sorted(os.listdir(path)) == ["metadata.json", "model.safetensors", "proof.json"]
        load_deployed(path)
        # The same weights under other names are another network, too.
        other = nets.source(variables=variables, labels=nets.LABELS[::-1])
        done = convert(other, Output(path), targets=parse_targets(["orbax"]))
        assert "removed: model.safetensors" in done.table()

    def test_preprocessing_matters_for_graphs_only(self, tmp_path):
        output = Output(tmp_path / "deploy")
        convert(nets.source(), output, targets=parse_targets(["stablehlo", "safetensors"]))
        targets = parse_targets(["orbax"])
        done = convert(nets.source(), output, targets=targets, with_preprocessing=True)
        assert "removed: model.stablehlo, with another preprocessing" in done.table()
        assert (output.path / "model.safetensors").exists()

    def test_formats_that_are_unknown_go(self, deploy, tmp_path):
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        content = json.loads((path / "proof.json").read_text())
        (entry,) = (e for e in content["artefacts"] if e["format"] == "orbax")
        entry["format"] = "of tomorrow"
        (path / "proof.json").write_text(json.dumps(content))
        done = convert(nets.source(), Output(path), targets=parse_targets(["safetensors"]))
        assert "removed: orbax, of an unknown format, of tomorrow" in done.table()

    def test_damaged_formats_go(self, deploy, tmp_path):
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        (path / "orbax" / "_METADATA").write_text("{}")
        done = convert(nets.source(), Output(path), targets=parse_targets(["safetensors"]))
        assert "removed: orbax, damaged: orbax/_METADATA" in done.table()
        load_deployed(path)

    def test_an_older_version_wrote_it(self, deploy, tmp_path):
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        metadata = json.loads((path / "metadata.json").read_text())
        del metadata["weights_sha256"], metadata["variant"]["dilation"]  # a later field
        (path / "metadata.json").write_text(json.dumps(metadata))
        done = convert(nets.source(), Output(path), targets=parse_targets(["stablehlo"]))
        assert "kept: orbax" in done.table()

    @pytest.mark.parametrize(
        ("version", "named"),
        [("this", "."), ("v0.1-0164ae8", "."), ("this", "model.safetensors")],
    )
    def test_formats_are_added_to_a_directory(self, deploy, tmp_path, version, named):
        """It goes on saying where its network is from and how it was proven."""
        path = tmp_path / "deploy"
        shutil.copytree(deploy if version == "this" else OLD / "deploy", path)
        before, files = load_deployed(path), set(os.listdir(path))
        source = from_weights(str(path / named), output=path)
        done = convert(source, Output(path), targets=parse_targets(["torch-timm"]))
        added = set(os.listdir(path)) - files
        assert {name.rpartition(".")[0] for name in added} == {"model.timm"}
        assert files < set(os.listdir(path))
        assert "removed" not in done.table()
        after = load_deployed(path)
        chex.assert_trees_all_equal(after.variables, before.variables)
        assert after.proof["fused"].items() >= before.proof["fused"].items()
        assert after.metadata["source"] == before.metadata["source"]
        assert len(after.proof["artefacts"]) == len(before.proof["artefacts"]) + len(added)

    def test_graphs_that_are_added_preprocess_as_those_that_are_there(self, tmp_path):
        path = tmp_path / "deploy"
        targets = parse_targets(["safetensors", "stablehlo"])
        convert(nets.source(), Output(path), targets=targets, with_preprocessing=True)
        assert from_weights(str(path), output=path).with_preprocessing
        assert not from_weights(str(path)).with_preprocessing

    def test_files_of_others_stay(self, deploy, tmp_path):
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        (path / "notes" / "deep").mkdir(parents=True)
        (path / "notes" / "deep" / "a.txt").write_text("x")
        (path / "orbax" / "mine.txt").write_text("y")
        (path / "secret").write_text("z")
        (path / "secret").chmod(0o600)
        (path / "link").symlink_to("nowhere")
        for targets in (parse_targets(["stablehlo"]), DEFAULT):
            convert(nets.source(), Output(path), targets=targets)
            assert (path / "notes" / "deep" / "a.txt").read_text() == "x"
            assert (path / "orbax" / "mine.txt").read_text() == "y"
            assert stat.S_IMODE((path / "secret").stat().st_mode) == 0o600
            assert os.readlink(path / "link") == "nowhere"
        load_deployed(path)

    def test_a_file_of_others_in_the_way(self, deploy, tmp_path):
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        (path / "model.stablehlo").write_text("mine")
        with pytest.raises(ValueError, match=r"model\.stablehlo was not written by"):
            convert(nets.source(), Output(path), targets=parse_targets(["stablehlo"]))
        assert (path / "model.stablehlo").read_text() == "mine"
        load_deployed(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["deploy"]


class TestLoadDeployed:
    """Reading a deploy directory."""

    def test_one_of_an_older_version(self):
        deployed = load_deployed(OLD / "deploy")
        assert deployed.model.variant.name == "tiny"
        assert deployed.metadata["classes"] == list("0123456789")
        assert deployed.proof["artefacts"][0]["format"] == "orbax"
        with np.load(OLD / "logits.npz") as recorded:
            found = jax.jit(deployed.model.apply)(deployed.variables, recorded["images"])
            assert nets.relative(recorded["deploy"], np.asarray(found)) <= 1e-5

    @pytest.mark.parametrize("name", ["metadata.json", "model.safetensors", "orbax/_METADATA"])
    def test_a_changed_file_is_refused(self, name, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        content = (tmp_path / "deploy" / name).read_bytes()
        # Each remains a readable file: a weight that is another one, or JSON with one more space.
        damaged = bytes([content[-1] ^ 1]) if name.endswith(".safetensors") else content[-1:] + b" "
        (tmp_path / "deploy" / name).write_bytes(content[:-1] + damaged)
        with pytest.raises(ValueError, match=name):
            load_deployed(tmp_path / "deploy")

    def test_what_is_not_needed_may_be_missing(self, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        shutil.rmtree(tmp_path / "deploy" / "orbax")
        load_deployed(tmp_path / "deploy")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("proof.json", None, r"proof\.json"),
            ("proof.json", "{", r"proof\.json"),
            ("proof.json", "[]", r"proof\.json.*object"),
            ("proof.json", "{}", r"digest"),
            ("metadata.json", None, "not a converted"),
            ("metadata.json", "{}", "not a converted"),
            ("model.safetensors", None, "--format safetensors"),
        ],
    )
    def test_a_missing_or_broken_file_is_named(self, name, content, message, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        (tmp_path / "deploy" / name).unlink()
        if content is not None:
            (tmp_path / "deploy" / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_deployed(tmp_path / "deploy")

    def test_a_proof_that_does_not_hold_is_refused(self, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        proof = json.loads((deploy / "proof.json").read_text())
        del proof["digest"]
        proof["fused"]["holds"] = False
        proof["digest"] = files.json_digest(proof)
        (tmp_path / "deploy" / "proof.json").write_text(json.dumps(proof))
        with pytest.raises(ValueError, match="fused network differs"):
            load_deployed(tmp_path / "deploy")
        load_deployed(tmp_path / "deploy", verify=False)

    @pytest.mark.parametrize("name", ["/proc/self/mem", "../other", "orbax/../../other"])
    def test_a_list_of_files_elsewhere_is_refused(self, name, deploy, tmp_path):
        """None of them is read, and no conversion takes them over."""
        path = tmp_path / "deploy"
        shutil.copytree(deploy, path)
        (tmp_path / "other").write_text("x")
        proof = json.loads((deploy / "proof.json").read_text())
        del proof["digest"]
        proof["sha256"][name] = files.sha256(tmp_path / "other")
        proof["digest"] = files.json_digest(proof)
        (path / "proof.json").write_text(json.dumps(proof))
        with pytest.raises(ValueError, match="outside"):
            load_deployed(path)
        convert(nets.source(), Output(path), targets=parse_targets(["safetensors"]))
        assert name not in load_deployed(path).proof["sha256"]
        assert (tmp_path / "other").read_text() == "x"

    @pytest.mark.parametrize("name", ["metadata.json", "proof.json", "model.safetensors"])
    def test_every_flipped_bit_is_noticed(self, name, deploy, tmp_path, rng):
        """In all three files that are read; without verifying, whatever is not refused loads."""
        shutil.copytree(deploy, tmp_path / "deploy")
        data = np.fromfile(deploy / name, np.uint8)
        for i in rng.choice(len(data), 40, replace=False):
            flipped = data.copy()
            flipped[i] ^= 1 << rng.integers(8)
            flipped.tofile(tmp_path / "deploy" / name)
            with pytest.raises(ValueError) as caught:  # noqa: PT011, any field may be meant
                load_deployed(tmp_path / "deploy")
            assert len(str(caught.value).splitlines()) == 1
            if i % 4 == 0:
                with contextlib.suppress(ValueError):
                    load_deployed(tmp_path / "deploy", verify=False)

    def test_a_list_without_its_digest_is_that_of_version_1(self, deploy, tmp_path):
        """Losing the digest does not turn a directory into an older one."""
        shutil.copytree(deploy, tmp_path / "deploy")
        proof = json.loads((deploy / "proof.json").read_text())
        del proof["digest"]
        (tmp_path / "deploy" / "proof.json").write_text(json.dumps(proof))
        with pytest.raises(ValueError, match="digest"):
            load_deployed(tmp_path / "deploy")
        assert "digest" not in json.loads((OLD / "deploy" / "proof.json").read_text())
        shutil.copytree(OLD / "deploy", tmp_path / "old")
        file = tmp_path / "old" / "orbax" / "_METADATA"
        file.write_bytes(file.read_bytes() + b" ")
        with pytest.raises(ValueError, match="orbax/_METADATA"):
            load_deployed(tmp_path / "old")

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("format", 3, "format=3"),
            ("variant", "A0", "variant='A0'"),
            ("variant", {"name": "x"}, "lacks depths"),
            ("variant.depths", [1, 2, 10**6], "1000003 blocks"),
            ("variant.depths", [1, 2, 10**400], "blocks"),
            ("variant.channels", [8, "16"], r"channels\[1\]='16'"),
            ("variant.stem_channels", 10**9, "1000000000 channels"),
            ("variant.se", 3, "se=3"),
            ("variant.se", {"reduction": 2.5}, "reduction=2.5"),
            ("variant.groups", {}, "groups={}"),
            ("num_classes", -1, "num_classes=-1"),
            ("num_classes", True, "num_classes=True"),
            ("activation", "selu", "selu"),
            ("activation", [], "activation"),
            ("classes", ["a"], "1 classes"),
            ("classes", {"a": 0}, "classes"),
            ("image_shape", [24, 24], "2 values"),
            ("image_shape", [24, 0, 3], "image_shape"),
            ("mean", [0.1, 0.2], "mean"),
            ("mean", [[[[0.5]]]], "mean"),
            ("std", [0.1, float("nan"), 0.1], "finite"),
            ("std", [0, 1, 1], "above 0"),
        ],
    )
    def test_types_and_ranges_are_checked(self, field, value, message, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        metadata = json.loads((deploy / "metadata.json").read_text())
        *outer, name = field.split(".")
        functools.reduce(dict.get, outer, metadata)[name] = value
        (tmp_path / "deploy" / "metadata.json").write_text(json.dumps(metadata))
        for verify in (True, False):
            with pytest.raises(ValueError, match=message) as caught:
                load_deployed(tmp_path / "deploy", verify=verify)
            assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("text", ["[" * 10**5, '{"kind":' * 10**5, "\0" * 900, "7", "\xff"])
    def test_files_that_are_not_what_they_were(self, text, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        for name in ("proof.json", "metadata.json"):
            (tmp_path / "deploy" / name).write_text(text, encoding="latin-1")
            with pytest.raises(ValueError, match=name):
                load_deployed(tmp_path / "deploy", verify=False)

    def test_the_page_says_how(self, deploy, monkeypatch):
        monkeypatch.chdir(deploy.parent)
        given = {"images": nets.images()}
        blocks = nets.documented("JAX with this package")
        assert len(blocks) == 3
        for block in blocks:
            exec(compile(block, "docs/deploy.md", "exec"), given)
            assert nets.relative(nets.expected("plain"), given.pop("logits")) <= 1e-5


class TestSource:
    """What a conversion starts from."""

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("x.pth", {}, r"x\.pth"),
            ("repvgg_a0.rvgg_in1k", {}, r"repvgg_a0\.rvgg_in1k"),
            ("hf-hub:timm/repvgg_a0", {}, r"timm/repvgg_a0\.rvgg_in1k"),
            ("timm/repvgg_a0", {"entry": "ema"}, "entry is for"),
            ("x.pth", {"image_size": 0}, "image-size=0"),
            ("x.pth", {"image_size": (64, 0)}, r"image-size=\(64, 0\)"),
            ("x.pth", {"image_size": "big"}, r"image-size='big' .*\(height, width\)"),
        ],
    )
    def test_weights_that_are_not_there(self, name, options, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises((ValueError, OSError), match=message):
            from_weights(name, Facts(**options))

    @pytest.mark.parametrize("path", [None, OLD / "deploy"])
    def test_an_earlier_conversion_of_any_variant(self, path, deploy, tmp_path):
        path = path or deploy  # images of three channels or of one
        before = load_deployed(path)
        given = from_weights(str(path))
        assert list(given.images.shape[1:]) == before.metadata["image_shape"]
        targets = parse_targets(["safetensors", "stablehlo"])
        done = convert(given, Output(tmp_path / "more"), targets=targets)
        assert (done.proof, (tmp_path / "more" / "model.stablehlo").exists()) == (None, True)
        after = load_deployed(tmp_path / "more")
        chex.assert_trees_all_equal(after.variables, before.variables)
        # Later versions know more about a variant.
        assert before.metadata["variant"].items() <= after.metadata["variant"].items()
        for key in ("classes", "mean", "std", "image_shape", "activation"):
            if key in before.metadata:
                assert after.metadata[key] == before.metadata[key]
        assert after.model.variant == before.model.variant  # which may have new fields since
        assert after.metadata["source"]["source"] == before.metadata["source"]
        assert after.metadata["source"]["fused"] == before.proof["fused"]

    def test_a_damaged_conversion_and_other_directories(self, deploy, tmp_path):
        shutil.copytree(deploy, tmp_path / "deploy")
        (tmp_path / "deploy" / "metadata.json").write_text('{"kind": "repvgg_jax deployment"}')
        with pytest.raises(ValueError, match=r"metadata\.json"):
            from_weights(str(tmp_path / "deploy"))
        with pytest.raises(ValueError, match=f"--workdir {tmp_path}$"):
            from_weights(str(tmp_path))

    @pytest.mark.parametrize("kind", ["plain", "silu", "features"])
    def test_a_file_of_ours_says_what_it_takes(self, kind, tmp_path):
        """Its architecture, too, if that is of one's own."""
        source = dataclasses.replace(nets.source(kind), crop=Crop(0.7, (0, 0, 9), 10.0))
        done = convert(source, Output(tmp_path / "deploy"), targets=DEFAULT)
        alone = tmp_path / "alone.safetensors"
        shutil.copy(done.output / "model.safetensors", alone)
        given, wanted = from_weights(str(alone)), load_deployed(done.output)
        assert given.model.variant == wanted.model.variant
        assert given.model.activation == wanted.model.activation
        assert given.labels == nets.source(kind).labels
        assert given.crop == source.crop
        assert given.normalize == nets.source(kind).normalize
        assert given.images.shape[1:] == nets.images().shape[1:]
        assert given.notes == ()
        chex.assert_trees_all_equal(given.variables, wanted.variables)
        convert(given, Output(tmp_path / "again"), targets=DEFAULT)
        again = load_deployed(tmp_path / "again")
        assert again.metadata["classes"] == wanted.metadata["classes"]
        with pytest.raises(ValueError, match=r"--mean .* header"):
            from_weights(str(alone), Facts(mean=(0.5,) * 3))

    def test_a_file_of_an_activation_without_a_name(self, tmp_path):
        """It must not come back as ReLU."""
        network = nets.fresh("plain")
        network.model = network.model.clone(activation=jnp.tanh)
        export("safetensors", network, tmp_path / "tanh.safetensors")
        with pytest.raises(ValueError, match=r"which activation .* none of relu, silu, gelu"):
            from_weights(str(tmp_path / "tanh.safetensors"))
        assert read_description(tmp_path / "tanh.safetensors").labels == network.labels

    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"train_size": 6},
            {"eval_size": 6},
            {"train_size": 6, "eval_crop": 0.5},
            {"train_size": 6, "eval_size": 7, "eval_crop": 1.0},
        ],
    )
    def test_image_files_are_cropped_as_in_evaluation(self, sizes):
        settings = small_settings(**{f"data__{k}": v for k, v in sizes.items()}).data
        dataset = load(settings)
        crop = center_crop(dataset.eval_shape, **dataclasses.asdict(crop_of(settings)))
        for number in range(3):
            example = dataset.evaluation[number]
            expected = example["image"] if dataset.eval_crop is None else dataset.eval_crop(example)
            np.testing.assert_array_equal(crop(example), expected)

    def test_a_file_of_an_older_version_lacks_its_architecture(self, tmp_path):
        """It is in the directory, not in the file."""
        with pytest.raises(ValueError, match=f"--from {OLD / 'deploy'}, or .* --workdir") as caught:
            from_weights(str(OLD / "deploy" / "model.safetensors"))
        assert len(str(caught.value)) < 400
        assert "depths" in str(caught.value)
        shutil.copy(OLD / "deploy" / "model.safetensors", tmp_path / "alone.safetensors")
        with pytest.raises(ValueError, match="--from DEPLOY"):
            from_weights(str(tmp_path / "alone.safetensors"))

    def test_a_damaged_header(self, deploy, tmp_path):
        content = (deploy / "model.safetensors").read_bytes()
        assert content.count(b'"[24, 32]"') == 1
        (tmp_path / "w.safetensors").write_bytes(content.replace(b'"[24, 32]"', b'"[24, 3a]"'))
        with pytest.raises(ValueError, match="header"):
            from_weights(str(tmp_path / "w.safetensors"))

    def test_a_file_of_another_project(self, tmp_path):
        """What it does not say is assumed, and said."""
        saved = random_variables(create_model("A0", num_classes=3))
        state = to_state_dict(saved, family="official")
        path = str(tmp_path / "w.pth")
        other = {
            key: array * 2 if array.dtype == np.float32 else array for key, array in state.items()
        }
        torch = pytest.importorskip("torch")
        as_torch = [{k: torch.from_numpy(v) for k, v in d.items()} for d in (state, other)]
        torch.save(dict(zip(("model", "ema"), as_torch, strict=True)), path)
        with pytest.raises(ValueError, match="model and ema"):
            from_weights(path)
        given = from_weights(path, Facts(entry="model"))
        chex.assert_trees_all_equal(given.variables, saved)
        assert given.images.shape[1:] == (224, 224, 3)
        note, left = given.notes
        assert "ema" in left
        for word in ("224x224", "ImageNet", "no class names"):
            assert word in note
        told = Facts(48, ("a", "b", "c"), (0.1, 0.2, 0.3), (1.0, 1.0, 0.5), "ema")
        given = from_weights(path, told)
        (left,) = given.notes
        assert "model" in left
        assert given.labels == ("a", "b", "c")
        assert given.normalize == Normalize((0.1, 0.2, 0.3), (1.0, 1.0, 0.5))
        kernel = given.variables["params"]["head"]["kernel"]
        np.testing.assert_array_equal(kernel, 2 * saved["params"]["head"]["kernel"])
        for wrong, message in (
            ({"classes": ("a", "b")}, "2 names.* 3 classes"),
            ({"std": None}, "both --mean and --std"),
            ({"mean": (0.5,), "std": (0.5,)}, "3 channels"),
            ({"entry": "nothing"}, "nothing"),
        ):
            with pytest.raises(ValueError, match=message):
                from_weights(path, dataclasses.replace(told, **wrong))

    def test_a_backbone_without_a_classifier(self, tmp_path):
        trained = random_variables(create_model("A0", num_classes=0))
        save_weights(tmp_path / "w.npz", trained, family="timm")
        given = from_weights(str(tmp_path / "w.npz"), Facts(image_size=(32, 64)))
        assert given.images.shape[1:] == (32, 64, 3)
        assert given.model.num_classes == 0
        assert "class names" not in given.notes[0]

    def test_images_of_ones_own(self, deploy, small_run):
        given = from_run(small_run[0], data="digits")
        assert given.image_source == "360 validation images of digits"
        with pytest.raises(ValueError, match=r"fake have the shape \(32, 32, 3\).*\(8, 8, 1\)"):
            from_run(small_run[0], data="fake")
        with pytest.raises(ValueError, match=r"fake.*\(32, 32, 3\).*\(24, 32, 3\)"):
            from_weights(str(deploy), data="fake")
        for missing in ("folder:/nothing/there", "nothing"):
            with pytest.raises(ValueError, match="nothing"):
                from_run(small_run[0], data=missing)

    def test_which_checkpoint(self, small_run, tmp_path):
        newest, best = (from_run(small_run[0], step=step) for step in ("newest", "best"))
        assert newest.details["step"] == 22
        by_step = {step: from_run(small_run[0], step=step) for step in (11, 22)}
        accuracies = {step: given.details["accuracy"] for step, given in by_step.items()}
        wanted = max(accuracies, key=lambda step: (accuracies[step], step))
        assert best.details["step"] == wanted
        assert f"{accuracies[wanted]:.2%}" in newest.notes[0]
        assert f"{accuracies[11]:.2%}" in by_step[11].notes[0]
        with pytest.raises(ValueError, match="step 5"):
            from_run(small_run[0], step=5)
        shutil.copytree(OLD / "run", tmp_path / "run")
        for manifest in (tmp_path / "run").rglob("manifest/metadata"):
            manifest.write_text("{")
        with pytest.raises(ValueError, match="evaluated"):
            from_run(tmp_path / "run", step="best")

    def test_a_run_without_its_data_and_its_optimizer(self, tmp_path):
        """It has the built-in photographs instead of its validation images, and says so."""
        content = json.loads((OLD / "run" / "config.json").read_text())
        content["data"] |= {"source": "folder:/images/that/are/gone", "train_size": 24}
        content["data"] |= {"mean": nets.MEAN, "std": nets.STD}
        settings = Settings.from_mapping(content)
        trained = random_variables(build_model(settings, 5), size=24)
        workdir = Workdir(tmp_path / "run")
        workdir.claim(settings)
        normalize = Normalize(nets.MEAN, nets.STD)
        workdir.write_metadata(RunMetadata(nets.LABELS, (24, 24, 3), (24, 24, 3), normalize))
        state = TrainState(step=jnp.int32(7), **trained, opt_state={}, ema={})
        with Checkpoints(workdir.checkpoints) as checkpoints:
            checkpoints.save(jax.device_put(state), wait=True)

        given = from_run(workdir.path)
        assert given.images.shape[1:] == (24, 24, 3)
        assert given.labels == nets.LABELS
        assert given.normalize == normalize
        done = convert(given, Output(tmp_path / "deploy"), targets=DEFAULT)
        assert "photographs" in done.table()
        assert "/images/that/are/gone" in done.table()
        deployed = load_deployed(tmp_path / "deploy")
        assert "photographs" in deployed.metadata["source"]["images"]
        chex.assert_trees_all_equal(deployed.variables, fuse_params(trained))

    def test_a_run_without_a_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match="no-run"):
            from_run(tmp_path / "no-run")
        with pytest.raises(ValueError, match=r"config\.json"):
            from_run(tmp_path)
        shutil.copytree(OLD / "run", tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        with pytest.raises(ValueError, match="no checkpoint"):
            from_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["official", "timm"])
def test_a_checkpoint_of_another_project(family, tmp_path):
    """A published file in, a fused network out, proven on photographs."""
    trained = random_variables(create_model("A0", num_classes=7))
    path = tmp_path / "a0.safetensors"
    save_weights(path, trained, family=family)
    given = from_weights(str(path), Facts(image_size=64))
    assert f"A0, training form, 7 classes, {family}" in given.title
    targets = parse_targets(["safetensors", "torch-timm", "orbax"])
    done = convert(given, Output(tmp_path / "deploy"), targets=targets)
    assert "photographs" in done.table()
    deployed = load_deployed(tmp_path / "deploy")
    chex.assert_trees_all_equal(deployed.variables, fuse_params(trained))
    again = load_weights(tmp_path / "deploy" / "model.timm.safetensors")
    assert (again.variant, again.deploy, again.family) == ("A0", True, "timm")
    chex.assert_trees_all_equal(again.variables, fuse_params(trained))

    # What came fused stays as it is.
    given = from_weights(str(tmp_path / "deploy" / "model.timm.safetensors"), Facts(image_size=64))
    assert convert(given, Output(tmp_path / "again"), targets=DEFAULT).proof is None
    chex.assert_trees_all_equal(load_deployed(tmp_path / "again").variables, deployed.variables)


@pytest.mark.system
class TestCommand:
    """The command, as a user runs it."""

    @pytest.mark.slow
    def test_a_run_converts_to_the_same_bits_on_any_number_of_devices(self, tmp_path):
        shutil.copytree(OLD / "run", tmp_path / "run")
        classes, shape = tuple("0123456789"), (8, 8, 1)
        metadata = RunMetadata(classes, shape, shape, Normalize((0.305,), (0.376,)))
        Workdir(tmp_path / "run").write_metadata(metadata)
        status, out, err = run("convert.py", "--workdir=run", "--output=deploy", cwd=tmp_path)
        assert (status, err) == (0, "")
        lines = [line for line in out.splitlines() if not line.startswith("converting: ")]
        assert lines[0] == "RepVGG tiny, step 66 of run"
        assert lines[2].split()[0] == "parameters"
        assert "same class on 100.00% of 360 images" in lines[4]
        assert lines[5] == "proof images: 360 validation images of digits"
        # This process has eight devices, that one had one.
        given = from_run(tmp_path / "run")
        assert given.details["step"] == 66
        convert(given, Output(tmp_path / "deploy8"), targets=DEFAULT)
        one, eight = (load_deployed(tmp_path / name) for name in ("deploy", "deploy8"))
        chex.assert_trees_all_equal(one.variables, eight.variables)
        assert one.metadata["classes"] == list(classes)
        assert one.model == create_model(one.model.variant, num_classes=10, deploy=True)

    def test_a_mistake_is_one_line(self, tmp_path):
        arguments = ["--workdir=x", "--output=y", "--format=onyx"]
        check_one_line(tmp_path, 1, ".*did you mean 'onnx'", "convert.py", *arguments)
        assert list(tmp_path.iterdir()) == []

    def test_traceback_shows_where_an_error_arose(self, tmp_path):
        status, _, err = run("convert.py", "--workdir=x", "--from=y", "--traceback", cwd=tmp_path)
        assert status == 1
        assert "Traceback" in err
        assert "not both" in err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "nothing to convert"),
            (["--workdir=x"], "give --output"),
            (["--from=x", "--output=y", "--step=best"], "--step=best is for a run"),
            (["--workdir=x", "--output=y", "--mean=1,2"], "--mean is for checkpoint files"),
            (["--workdir=x", "--output=y", "--step=0"], "--step=0"),
            (["--from=x", "--output=y", "--std=1,two"], "--std=1,two"),
            (["--from=x", "--output=y", "--with-preprocessing"], "graphs only"),
            (["--from=x", "--output=y", "--classes=one"], "--classes=one"),
            (["--from=x", "--output=y", "--calibrate=/i"], "--calibrate is for --quantize int8"),
            (["--workdir=x", "--output=y", "--noequalize"], "--equalize is for --quantize int8"),
            (["--from=x", "--output=y", "--quantize=int8"], "give --calibrate"),
            (
                ["--workdir=x", "--output=y", "--quantize=int8", "--target=arn"],
                "did you mean 'arm'",
            ),
            (["--workdir=x", "--output=y", "--quantize=int8", "--calibrate=run:0"], "SOURCE:N"),
            (["--workdir=x", "--output=y", "--quantize=int8", "--calibrate="], "SOURCE:N"),
            (["--workdir=x", "--output=y", "--quantize=int8", "--percentile=99"], "not mse"),
        ],
    )
    def test_what_is_missing_is_named(self, arguments, message):
        with flagsaver.flagsaver():
            flags.FLAGS(["convert.py", *arguments])
            with pytest.raises(ValueError, match=message):
                command.main([])

    def test_help_lists_the_formats(self):
        told = flags.FLAGS["format"].help
        assert all(f" {name}" in told for name in FORMATS)
