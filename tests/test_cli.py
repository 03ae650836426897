"""train.py, run as a user runs it; convert.py is in test_convert.py."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from repvgg_jax import save_weights
from repvgg_jax.train.restore import load_run
from tests.flags import xla_flags

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


@pytest.fixture(scope="module")
def weights(place):
    """The network of the trained run, as a file."""
    run = load_run(place / "runs" / "digits")
    save_weights(place / "weights.npz", run.variables, family="flax", variant=run.model.variant)


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


def wait_for(condition, process, seconds=120):
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
    out, err = process.communicate(timeout=60)
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


def check_one_line(cwd, status, message, script, *arguments):
    found, out, err = run(script, *arguments, cwd=cwd)
    assert (found, out) == (status, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert re.match(message, err.removeprefix("error: ")), err


def test_a_workdir_of_another_configuration(place):
    check_one_line(
        place,
        1,
        r"runs/digits holds a run with another configuration: .*seed: 0 -> 5",
        "train.py",
        *SHORT,
        "--config.seed=5",
    )


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
