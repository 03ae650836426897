"""What commit 0164ae8 wrote can still be read; `tests/data/v0.1-0164ae8` says how it was made."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from repvgg_jax import Variant, create_model, fuse_params, load_weights
from tests.helpers import commands

ROOT = pathlib.Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "data" / "v0.1-0164ae8"

# As train.py of that commit printed them: 201 of 360 images.
EVALUATED = {"accuracy": 0.5583, "loss": 1.1781, "top5": 0.9806}


@pytest.fixture(scope="module")
def recorded():
    with np.load(OLD / "logits.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def variant():
    return Variant(**json.loads((OLD / "deploy" / "metadata.json").read_text())["variant"])


def relative(expected, found) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def run(script: str, *arguments: object, cwd: pathlib.Path) -> str:
    status, out, err = commands.run(script, *arguments, cwd=cwd)
    assert (status, err) == (0, "")
    return out


def logits(variant, path: pathlib.Path, images, *, deploy: bool):
    loaded = load_weights(path, variant=variant)
    assert loaded.deploy == deploy
    model = create_model(variant, num_classes=10, deploy=deploy)
    return jax.jit(model.apply)(loaded.variables, images)


def test_weights_files_have_the_same_logits(variant, recorded):
    found = logits(variant, OLD / "deploy" / "model.safetensors", recorded["images"], deploy=True)
    assert relative(recorded["deploy"], found) <= 1e-5
    found = logits(variant, OLD / "train.safetensors", recorded["images"], deploy=False)
    assert relative(recorded["train"], found) <= 1e-5


def test_fusing_gives_the_same_kernels(variant):
    """Every entry is one product and at most two sums: a few roundings of the largest."""
    fused = fuse_params(load_weights(OLD / "train.safetensors", variant=variant).variables)
    old = load_weights(OLD / "deploy" / "model.safetensors", variant=variant).variables
    assert jax.tree.structure(fused) == jax.tree.structure(old)
    assert max(jax.tree.leaves(jax.tree.map(relative, old, fused))) <= 1e-6


@pytest.mark.slow
@pytest.mark.system
def test_a_run_converts(variant, recorded, tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    formats = "orbax,safetensors,stablehlo"
    out = run("convert.py", "--workdir=run", "--output=new", f"--format={formats}", cwd=tmp_path)
    assert "RepVGG tiny, step 66 of run" in out.splitlines()
    assert "no metadata.json" in out  # its classes come from its data
    assert (tmp_path / "new" / "orbax").is_dir()
    path = tmp_path / "new" / "model.safetensors"
    assert relative(recorded["deploy"], logits(variant, path, recorded["images"], deploy=True)) <= (
        1e-5
    )
    exported = jax.export.deserialize(bytearray((OLD / "deploy" / "model.stablehlo").read_bytes()))
    assert relative(recorded["deploy"], exported.call(recorded["images"])) <= 1e-5


@pytest.mark.slow  # in one process: test_a_run_converts
@pytest.mark.parametrize("source", ["--workdir=run", "--init_from=deploy"])
@pytest.mark.system
def test_runs_and_conversions_are_evaluated(source, tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    shutil.copytree(OLD / "deploy", tmp_path / "deploy")
    out = run("train.py", f"--config={OLD / 'config.py'}", "--eval_only", source, cwd=tmp_path)
    *_, rows = out.partition("360 images\n")
    _, *rows = (line for line in rows.splitlines() if not line.startswith(("lowest", "written")))
    found = {name: [float(value) for value in values] for name, *values in map(str.split, rows)}
    assert found.keys() == {*EVALUATED, "macro_accuracy"}
    for name, value in EVALUATED.items():
        # Four digits are printed; one image on the other side of a tie is 1 / 360.
        assert found[name] == pytest.approx([value] * 2, abs=2e-4 if name == "loss" else 0.003)
