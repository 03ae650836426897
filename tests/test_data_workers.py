"""Workers ignore the signals that stop a run, and end with it."""

import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from repvgg_jax.data.batches import train_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.data.settings import DataSettings
from tests.helpers.flags import xla_flags
from tests.helpers.pictures import images, write_tree
from tests.helpers.processes import RECIPE, ROOT
from tests.helpers.sharding import OVER_BATCH

FILES = images(train=24, val=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data"), FILES)


def children(process: int) -> list[int]:
    """All living descendants of a process."""
    found = []
    for task in pathlib.Path("/proc", str(process), "task").glob("*"):
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children(child)]
    return found


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in pathlib.Path("/proc", str(process), "status").read_text()
    except FileNotFoundError:
        return False


def left_over(processes: list[int], seconds: float = 300) -> list[int]:
    """Those that still live after a while."""
    deadline = time.monotonic() + seconds
    while (left := list(filter(alive, processes))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_ignores_signals_from_its_first_moment_on(folder):
    data = load(DataSettings(source=f"folder:{folder}", train_size=16, workers=2))
    before = set(multiprocessing.active_children())
    batches = train_batches(data, batch_size=8, seed=0, start_step=0, sharding=OVER_BATCH)

    def send():
        while len(workers := set(multiprocessing.active_children()) - before) < 2:
            time.sleep(0.001)
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(worker.pid, number)

    sender = threading.Thread(target=send)
    sender.start()
    next(batches)  # starts them
    sender.join()
    for worker in set(multiprocessing.active_children()) - before:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    for _ in range(30):
        next(batches)
    batches.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.slow
@pytest.mark.system
class TestARun:
    ARGUMENTS = [
        "--config=recipe.py",
        "--workdir=run",
        "--config.train.epochs=50",  # of 3 steps
        "--config.train.batch_size=8",
        "--config.eval.every_epochs=50",
        "--config.eval.batch_size=8",
        "--config.checkpoint.every_epochs=50",
        "--config.report.every_steps=1",
        "--config.data.workers=2",
        "--config.data.train_size=32",
    ]

    def start(self, folder, place):
        (place / "recipe.py").write_text(RECIPE.replace('"fake"', repr(f"folder:{folder}")))
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *self.ARGUMENTS],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def begun(self, place):
        metrics = place / "run" / "metrics.jsonl"
        return lambda: metrics.exists() and metrics.read_text().count("\n") >= 5

    def test_a_signal_to_all_of_its_processes_saves_and_continues(self, folder, tmp_path):
        """As SIGINT from a terminal, which test_cli.py sends to one process."""
        process = self.start(folder, tmp_path)
        wait_for(self.begun(tmp_path), process)
        started = children(process.pid)
        assert len(started) >= 2
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=300)
        # The last batch lies in shared memory, of which Python may have to say that it freed it.
        assert [line for line in err.splitlines() if not re.search(r"resource_tracker", line)] == []
        assert process.returncode == 0
        assert "SIGTERM at step" in out.splitlines()[-1]
        assert left_over(started) == []
        out, err = (process := self.start(folder, tmp_path)).communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
        assert "resuming from step" in out
        metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(line)["step"] for line in metrics} == set(range(1, 151))

    def test_a_run_that_is_killed_leaves_no_workers(self, folder, tmp_path):
        process = self.start(folder, tmp_path)
        wait_for(self.begun(tmp_path), process)
        started = children(process.pid)
        assert len(started) >= 2
        process.kill()
        process.communicate(timeout=300)
        assert left_over(started) == []
