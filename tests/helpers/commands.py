"""The scripts, run as a user runs them."""

import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable

from tests.helpers.flags import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHORT = ["--config.train.epochs=1", "--config.optimizer.warmup_epochs=0"]


def start(script: str, *arguments: object, cwd: pathlib.Path, devices: int = 1) -> subprocess.Popen:
    """Starts a script in a directory of its own."""
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


def run(
    script: str, *arguments: object, cwd: pathlib.Path, devices: int = 1
) -> tuple[int, str, str]:
    """Runs a script; its exit status, standard output and standard error."""
    process = start(script, *arguments, cwd=cwd, devices=devices)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def check_one_line(
    cwd: pathlib.Path, status: int, message: str, script: str, *arguments: object
) -> None:
    """Runs a script that must fail with one line on standard error."""
    found, out, err = run(script, *arguments, cwd=cwd)
    assert (found, out) == (status, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert re.match(message, err.removeprefix("error: ")), err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until a condition holds; fails if the process ends before. Tests have a timeout."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
