"""train.py, run as a user runs it; convert.py is in test_convert.py."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT, SHORT, check_one_line, run, start, wait_for

pytestmark = pytest.mark.system


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["--init_from=runs/digits", "--workdir=nowhere"], "step 22 of runs/digits"),
        (["--config.init_from=nothing.pth", "--by_class"], "step 22 of runs/digits"),
    ],
)
def test_evaluating_what_was_trained(digits_run, arguments, source, tmp_path):
    """What --init_from names is evaluated; what a configuration starts from is not."""
    output = f"--output={tmp_path}"
    status, out, err = run("train.py", "--eval_only", output, *arguments, cwd=digits_run)
    assert (status, err) == (0, "")
    first, _, *table, written = out.splitlines()
    assert written.startswith(f"written to {tmp_path}: evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text())["source"] == source
    assert first == f"{source}: 360 images"
    last = json.loads((digits_run / "runs/digits/metrics.jsonl").read_text().splitlines()[-1])
    accuracy = next(line for line in table if line.startswith("accuracy")).split()[1:]
    assert accuracy == [f"{last['final/accuracy']:.4f}", f"{last['final/accuracy_fused']:.4f}"]
    assert len(table) == 4 + 1 + 10 * ("--by_class" in arguments)
    assert not (digits_run / "nowhere").exists()


@pytest.mark.slow  # in one process: test_training_restore.py
def test_training_from_what_was_trained(digits_run, tmp_path):
    source = f"--init_from={digits_run / 'runs' / 'digits'}"
    status, out, err = run("train.py", *SHORT, source, "--workdir=tuned", cwd=tmp_path)
    assert (status, err) == (0, "")
    assert out.startswith(f"recipe={digits_run / 'runs' / 'digits'} model=digits ")
    assert "digits, training form, 10 classes" in out
    assert out.splitlines()[-1] == "next: python convert.py --workdir tuned --output deploy"
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["init_from"] == str(digits_run / "runs" / "digits")


@pytest.mark.slow  # in one process: test_training_loop.py
def test_an_interrupted_run_resumes_with_the_same_command(tmp_path):
    """By SIGINT; test_data_workers.py sends SIGTERM, and test_digits.py SIGKILL."""
    arguments = ["--workdir=run", "--config.train.epochs=3", "--config.report.every_steps=1"]
    process = start("train.py", *arguments, cwd=tmp_path)
    saved = tmp_path / "run" / "checkpoints" / "22"
    wait_for(saved.exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert err == ""
    assert process.returncode == 130
    assert "SIGINT at step" in out.splitlines()[-1]
    status, out, err = run("train.py", *arguments, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "resuming from step" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, 67))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--config.train.bath_size=3"], 2, '.*bath_size.*"batch_size"'),
        (["--config.train.batch_size=many"], 2, ".*batch_size=many: it takes an integer"),
        (["--config=configs/dgits.py"], 2, "--config=configs/dgits.py: .*no such file; .*'digits'"),
        (["--wrokdir=x"], 2, ".*'wrokdir'"),
        (["digits"], 2, ".*'digits'"),
        (["--config.train.batch_size=0"], 1, r"config.train.batch_size=0 .* 1"),
        (["--config.train.batch-size=8"], 2, r".*batch-size; .*config.train.batch_size"),
        (["--workdir=/proc/nowhere/run"], 1, ".*/proc/nowhere"),
        (["--eval-only", "--init_from=x.pth", "--step=3"], 1, "--step=3 .*x.pth"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, status, message):
    check_one_line(tmp_path, status, message, "train.py", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_and_the_command_of_an_installed_package(tmp_path):
    status, out, err = run("train.py", "--help", cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "  python train.py --workdir runs/mine --eval_only" in out
    assert "  130 interrupted" in out
    for flag in ("--config", "--workdir", "--init_from", "--[no]eval_only", "--compile_only"):
        assert flag in out
    program = "from repvgg_jax.train.command import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: give --config")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow  # in one process: test_checkpoint.py
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """On a disk of 6 MB the run stops with an error, and earlier checkpoints are valid."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
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


PROGRAM = """
import importlib, sys
from absl import flags
from repvgg_jax import cli, command_help
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    own = flags.FLAGS.get_key_flags_for_module(module)
    if not own:
        continue  # it defines them when it is run
    assert "Others" not in command_help.groups_of(module), (name, command_help.groups_of(module))
    listed = [flag for group in command_help.groups_of(module).values() for flag in group]
    assert sorted(listed) == sorted(flag.name for flag in own), (name, listed)
    styles = {mark for flag in own for mark in "-_" if mark in flag.name}
    assert len(styles) <= 1, (name, styles)
    for flag in own:
        for spelled in (flag.name.replace("-", "_"), flag.name.replace("_", "-")):
            given = [name, f"--{spelled}=a-b_c", f"-{spelled}=-1", "--", f"--{spelled}"]
            defined = [name, f"--{flag.name}=a-b_c", f"--{flag.name}=-1", *given[3:]]
            assert cli.as_defined(given) == defined, defined
            value = [name, f"--{spelled}", f"-{spelled}", spelled]
            if flag.boolean:
                for no in ("-no", "--no-"):
                    assert cli.as_defined([name, f"{no}{spelled}"]) == [name, f"--no{flag.name}"]
                assert cli.as_defined([name, f"--non{spelled}"]) == [name, f"--non{spelled}"]
            else:  # what follows is its value
                assert cli.as_defined(value) == [name, f"--{flag.name}", *value[2:]]
            assert cli.is_given(flag.name, value)
            assert not cli.is_given(flag.name, [name, flag.name, "--", f"--{flag.name}"])
    text = command_help.text(module)
    command = command_help.command_of(module)
    assert f"usage: {command} " in text
    assert text.count(command) >= 2, name  # an example
    for flag in own:
        flags.FLAGS.__delattr__(flag.name)
"""


def test_every_flag_is_in_one_group_of_the_help(tmp_path):
    """Of every command; modules of commands are not imported here, as their flags would clash."""
    commands = [
        path for path in (ROOT / "repvgg_jax").rglob("*.py") if "cli.run(main" in path.read_text()
    ]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in commands]
    assert len(names) >= 7
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_quiet(digits_run, tmp_path):
    """Results alone: a table, and nothing of what is read and written."""
    arguments = ["--eval_only", "--quiet", "--init_from=runs/digits", f"--output={tmp_path}"]
    status, out, err = run("train.py", *arguments, cwd=digits_run)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "step 22 of runs/digits: 360 images"
    assert out.splitlines()[-1].startswith("lowest by class")
    assert (tmp_path / "evaluation.json").exists()


@pytest.mark.slow
def test_a_run_directory_explains_itself(digits_run):
    """Every file that is there, and how to go on."""
    text = (digits_run / "runs" / "digits" / "README.txt").read_text()
    assert "python train.py --workdir RUN --eval_only" in text
    for path in (digits_run / "runs" / "digits").iterdir():
        assert path.name in text or path.name == "README.txt"
