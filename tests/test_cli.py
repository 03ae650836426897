"""The two scripts, run as a user runs them."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_params, load_weights, save_weights
from repvgg_jax.convert.deployed import load_deployed
from repvgg_jax.proof import logits
from repvgg_jax.train.run import Run
from repvgg_jax.train.trained import trained_state
from repvgg_jax.train.workdir import Workdir
from tests.flags import xla_flags
from tests.trees import random_variables

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = ["--config.train.epochs=1", "--config.optimizer.warmup_epochs=0"]


def start(script: str, *arguments: object, cwd: pathlib.Path, devices: int = 1):
    """Starts a script in a directory of its own, as an installed user would."""
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::DeprecationWarning:repvgg_jax",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *arguments: object, cwd: pathlib.Path, devices: int = 1):
    process = start(script, *arguments, cwd=cwd, devices=devices)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a trained run in it, made by the bare command."""
    cwd = tmp_path_factory.mktemp("user")
    status, out, err = run("train.py", *SHORT, cwd=cwd)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "next: python convert.py --workdir runs/digits --output deploy"
    return cwd


def test_converting_what_was_trained(place):
    status, out, err = run(
        "convert.py", "--workdir", "runs/digits", "--output", "deploy", cwd=place
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "RepVGG digits, step 22 of runs/digits"
    assert lines[2].split() == ["parameters", "321,290", "287,722", "89.6%"]
    assert lines[4].startswith("proof: max |Δlogit| ")
    assert "same class on 100.00% of 360 images" in lines[4]
    proof = json.loads((place / "deploy" / "proof.json").read_text())
    assert proof["fused"]["holds"] is True
    assert proof["fused"]["images"] == 360
    assert proof["fused"]["relative"] <= proof["fused"]["tolerance"] == 1e-5

    again, _, err = run("convert.py", "--workdir=runs/digits", "--output=deploy", cwd=place)
    assert (again, err) == (0, "")  # an earlier conversion is replaced
    assert sorted(e.name for e in place.iterdir()) == ["deploy", "runs"]


def test_a_conversion_on_another_number_of_devices(place, tmp_path):
    """What was trained on one device converts on eight, to the same bits."""
    for devices in (1, 8):
        status, _, err = run(
            "convert.py",
            f"--workdir={place / 'runs' / 'digits'}",
            f"--output={tmp_path / str(devices)}",
            cwd=tmp_path,
            devices=devices,
        )
        assert (status, err) == (0, "")
    one, eight = (load_deployed(tmp_path / name).variables for name in ("1", "8"))
    chex.assert_trees_all_equal(one, eight)


def test_what_convert_wrote_loads_and_classifies(place, tmp_path):
    output = tmp_path / "deploy"
    status, _, err = run(
        "convert.py", "--workdir", place / "runs" / "digits", "--output", output, cwd=tmp_path
    )
    assert (status, err) == (0, "")
    deployed = load_deployed(output)
    assert deployed.metadata["classes"] == list("0123456789")
    assert deployed.metadata["source"]["step"] == 22
    assert deployed.metadata["versions"].keys() >= {"jax", "flax", "repvgg-jax"}
    assert deployed.model == create_model(deployed.model.variant, num_classes=10, deploy=True)

    import orbax.checkpoint as ocp
    from sklearn.datasets import load_digits

    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            (output / "orbax").absolute(), jax_abstract(deployed.variables)
        )
    chex.assert_trees_all_equal(restored, deployed.variables)
    digits = load_digits()
    pixels = (digits.images[..., None] / 16).astype(np.float32)
    images = (pixels - deployed.metadata["mean"]) / deployed.metadata["std"]
    scores = logits(deployed.model.apply, deployed.variables, images.astype(np.float32))
    last = json.loads((place / "runs/digits/metrics.jsonl").read_text().splitlines()[-1])
    assert (scores.argmax(-1) == digits.target).mean() > 0.5
    assert 0.5 < last["final/accuracy_fused"] <= 1


def jax_abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


@pytest.fixture(scope="module")
def weights(place):
    """The network of the trained run, as a file."""
    workdir = Workdir(place / "runs" / "digits")
    trained = Run.from_config(workdir.read_config())
    state = trained_state(workdir, trained)
    variables, variant = jax.device_get(state.result), trained.model.variant
    save_weights(place / "weights.npz", variables, family="flax", variant=variant)


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["--init_from=runs/digits", "--workdir=nowhere"], "step 22 of runs/digits"),
        (["--init_from=weights.npz"], "digits, training form, 10 classes, flax names"),
        (["--config.init_from=nothing.pth"], "step 22 of runs/digits"),
    ],
)
def test_evaluating_what_was_trained(place, weights, arguments, source):
    """What is named is evaluated; what a configuration starts from is not."""
    status, out, err = run("train.py", "--eval_only", *arguments, cwd=place)
    assert (status, err) == (0, "")
    first, _, *table = out.splitlines()
    assert first == f"{source}: 360 images"
    last = json.loads((place / "runs/digits/metrics.jsonl").read_text().splitlines()[-1])
    accuracy = next(line for line in table if line.startswith("accuracy")).split()[1:]
    assert accuracy == [f"{last['final/accuracy']:.4f}", f"{last['final/accuracy_fused']:.4f}"]
    assert not (place / "nowhere").exists()


def test_training_from_what_was_trained(place, tmp_path):
    source = f"--init_from={place / 'runs' / 'digits'}"
    status, out, err = run("train.py", *SHORT, source, "--workdir=tuned", cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "starting from digits, training form, 10 classes" in out
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["init_from"] == str(place / "runs" / "digits")


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        # SIGKILL comes twenty times in test_digits.py.
    ],
)
def test_an_interrupted_run_continues_with_the_same_command(tmp_path, number):
    arguments = ["--workdir=run", "--config.train.epochs=3", "--config.report.every_steps=1"]
    process = start("train.py", *arguments, cwd=tmp_path)
    metrics, saved = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints" / "22"
    wait_for(saved.exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert err == ""
    assert process.returncode == {signal.SIGTERM: 0, signal.SIGINT: 130}.get(number, -number)
    if number != signal.SIGKILL:
        assert f"{number.name} at step" in out.splitlines()[-1]
    status, out, err = run("train.py", *arguments, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "continuing from step" in out
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, 67))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--config.train.bath_size=3"], 2, '.*bath_size.* Did you mean "batch_size"'),
        (["--config.trian.epochs=3"], 2, '.*trian.* Did you mean "train"'),
        (["--config.train.batch_size=many"], 2, r".*batch_size=many: invalid literal for int"),
        (
            ["--config=configs/nothing.py"],
            1,
            "--config=configs/nothing.py: no such file; .*digits.py",
        ),
        (["--wrokdir=x"], 2, ".*[Uu]nknown command line flag 'wrokdir'.*"),
        (["digits"], 2, "unexpected argument 'digits'; see --help"),
        (["--config.train.batch_size=0"], 1, r"config.train.batch_size=0 .* 1"),
        (["--config.data.source=digit"], 1, "unknown data set 'digit'.*'digits'"),
        (["--workdir=/proc/nowhere/run"], 1, ".*/proc/nowhere"),
        (["--eval_only", "--workdir=x"], 1, "x does not exist; give the --workdir of a training"),
        (["--eval_only", "--init_from=x.pth"], 1, "x.pth: "),
        (["--eval_only", "--init_from=x.pth", "--step=3"], 1, "--step=3 is that of .* x.pth is no"),
    ],
)
def test_mistakes_of_training_are_one_line(tmp_path, arguments, status, message):
    check_one_line(tmp_path, status, message, "train.py", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 1, "give --workdir, .* or --from, .* and --output"),
        (["--workdir=nothing", "--output=x"], 1, "nothing does not exist; give the --workdir"),
        (["--workdir=.", "--output=x"], 1, ". is no run's directory: it has no config.json"),
        (
            ["--workdir=.", "--output=x", "--format=onyx"],
            1,
            "unknown format 'onyx'; did you mean onnx",
        ),
        (["--workdir=.", "--output=x", "--format=onnx:int4"], 1, "format onnx cannot .* 'int4'"),
        (["--from=x.pth", "--workdir=.", "--output=x"], 1, "give --workdir, .* or --from"),
        (["--from=x.pth", "--output=x"], 1, "x.pth: .*"),
        (["--from=repvgg_a0.rvgg_in1k", "--output=x"], 1, ".*repvgg_a0.rvgg_in1k.*"),
    ],
)
def test_mistakes_of_converting_are_one_line(tmp_path, arguments, status, message):
    check_one_line(tmp_path, status, message, "convert.py", *arguments)
    assert list(tmp_path.iterdir()) == []


def check_one_line(cwd, status, message, script, *arguments):
    found, out, err = run(script, *arguments, cwd=cwd)
    assert (found, out) == (status, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert re.match(message, err.removeprefix("error: ")), err


def test_a_proof_that_fails_writes_nothing(place, tmp_path):
    check_one_line(
        tmp_path,
        1,
        r"the fused network is not the one that was trained: max .*\(> 1e-12\).*; wrote nothing",
        "convert.py",
        f"--workdir={place / 'runs' / 'digits'}",
        "--output=deploy",
        "--tolerance=1e-12",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tolerance_that_nothing_meets(place, tmp_path):
    workdir = f"--workdir={place / 'runs' / 'digits'}"
    message = "tolerance 0.0 must be positive"
    check_one_line(tmp_path, 1, message, "convert.py", workdir, "--output=x", "--tolerance=0")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["official", "timm"])
def test_converting_a_checkpoint_of_another_project(tmp_path, family):
    """A published file in, a fused network out, proven on photographs."""
    trained = random_variables(create_model("A0", num_classes=7))
    save_weights(tmp_path / "a0.safetensors", trained, family=family)
    status, out, err = run(
        "convert.py",
        "--from=a0.safetensors",
        "--output=deploy",
        "--image-size=64",
        "--format=safetensors,torch-timm,orbax",
        cwd=tmp_path,
    )
    assert (status, err) == (0, ""), err
    assert f"RepVGG A0, training form, 7 classes, {family} names of a0.safetensors" in out
    deployed = load_deployed(tmp_path / "deploy")
    chex.assert_trees_all_equal(deployed.variables, fuse_params(trained))
    assert deployed.proof["fused"]["holds"] is True
    again = load_weights(tmp_path / "deploy" / "model.timm.safetensors")
    assert (again.variant, again.deploy, again.family) == ("A0", True, "timm")
    chex.assert_trees_all_equal(again.variables, fuse_params(trained))

    # What came fused stays as it is, and says that nothing was to prove.
    status, out, err = run(
        "convert.py",
        "--from=deploy/model.timm.safetensors",
        "--output=again",
        "--image-size=64",
        cwd=tmp_path,
    )
    assert (status, err) == (0, ""), err
    assert "proof: none, it came in deploy form" in out
    chex.assert_trees_all_equal(load_deployed(tmp_path / "again").variables, deployed.variables)


def test_an_output_that_holds_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "letter.txt").write_text("x")
    workdir = f"--workdir={place / 'runs' / 'digits'}"
    check_one_line(
        tmp_path, 1, "deploy already holds letter.txt", "convert.py", workdir, "--output=deploy"
    )
    check_one_line(
        tmp_path,
        1,
        "deploy/letter.txt is a file",
        "convert.py",
        workdir,
        "--output=deploy/letter.txt",
    )
    assert (tmp_path / "deploy" / "letter.txt").read_text() == "x"


def test_a_run_without_a_checkpoint(place, tmp_path):
    shutil.copytree(place / "runs" / "digits", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    check_one_line(
        tmp_path, 1, "run holds no checkpoint yet", "convert.py", "--workdir=run", "--output=x"
    )


def test_a_workdir_of_another_configuration(place):
    check_one_line(
        place,
        1,
        r"runs/digits holds a run with another configuration: .*seed: 0 -> 5",
        "train.py",
        *SHORT,
        "--config.seed=5",
    )


def test_traceback_shows_where_an_error_arose(tmp_path):
    status, _, err = run("convert.py", "--workdir=x", "--output=y", "--traceback", cwd=tmp_path)
    assert status == 1
    assert "Traceback" in err
    assert "read_config" in err


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """A disk of 9 MB: the run stops with a line, and what was saved before is sound."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs privileges")
    try:
        status, out, err = run(
            "train.py",
            "--workdir=disk/run",
            "--config.train.epochs=6",
            "--config.checkpoint.keep=6",
            cwd=tmp_path,
        )
        assert status == 1
        assert "error: " in err.splitlines()[-1]
        saved = [int(e.name) for e in (disk / "run" / "checkpoints").iterdir() if e.name.isdigit()]
        assert saved, out
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a read-only disk needs privileges")
    try:
        check_one_line(
            tmp_path, 1, ".*Read-only file system.*disk/run", "train.py", "--workdir=disk/run"
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
