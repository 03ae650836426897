"""Many processes as one run. The processes are real, each with its own CPU devices."""

import json
import pathlib
import re
import resource
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from repvgg_jax.cluster import consensus as distributed
from repvgg_jax.cluster.process_info import Place, launched_place
from repvgg_jax.cluster.watchdog import PATIENCE, Watch
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.loop import train
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.validate import check_batches
from tests.helpers.pictures import damaged, images, write_tree
from tests.helpers.processes import RECIPE, free_port, started

# A process that is silent for PATIENCE counts as lost; then two rounds of last words, each of a few
# seconds, and the processes end.
STATED_SECONDS = PATIENCE + 30


def recipe():
    namespace: dict = {}
    exec(RECIPE, namespace)
    return namespace["get_config"]()


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def final_state(path: pathlib.Path):
    with Checkpoints(path / "checkpoints") as checkpoints:
        return jax.device_get(
            checkpoints.restore(Experiment.from_config(recipe()).abstract_state())
        )


def distance(tree, other) -> float:
    """Euclidean distance of two trees, relative to the norm of the first."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
    apart = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(a.astype(np.float64) ** 2)) for a, _ in pairs)) ** 0.5


def assert_same_run(path: pathlib.Path, other: pathlib.Path) -> None:
    """Losses and parameters to 1e-6 relative; sums over devices are in another order."""
    table = [
        [(r["step"], k, v) for r in rows(p) for k, v in r.items() if k.endswith("loss")]
        for p in (path, other)
    ]
    assert [row[:2] for row in table[0]] == [row[:2] for row in table[1]]
    np.testing.assert_allclose(
        [row[2] for row in table[1]], [row[2] for row in table[0]], rtol=1e-6
    )
    state, others = final_state(path), final_state(other)
    assert int(state.step) == int(others.step) == 16
    assert distance(state.params, others.params) <= 1e-6
    assert distance(state.batch_stats, others.batch_stats) <= 1e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run by one process that drives all eight devices."""
    path = tmp_path_factory.mktemp("alone") / "run"
    train(recipe(), path)
    return path


@pytest.mark.parametrize("launcher", ["slurm", pytest.param("open mpi", marks=pytest.mark.slow)])
def test_two_processes_are_one_run(alone, tmp_path, launcher):
    with started(tmp_path, 2, devices=4, launcher=launcher) as run:
        assert run.wait() == [0, 0]
    for process in (0, 1):
        first = run.out(process).splitlines()[0]
        assert first == (
            f"process {process} of 2, 4 of 8 devices; global batch 64 = 32 a process = 8 a device; "
            "batch normalisation over 64"
        )
        assert run.err(process) == ""
    assert "step 16/16" in run.out(0)
    assert "step" not in run.out(1)
    assert_same_run(alone, tmp_path / "run")


def test_two_processes_evaluate_and_say_what_falls_to_each(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    with started(tmp_path, 2, "--eval_only", devices=4) as run:
        assert run.wait() == [0, 0]
    for process in (0, 1):
        assert run.out(process).splitlines()[0] == (
            f"process {process} of 2, 4 of 8 devices; global batch 64 = 32 a process = 8 a device"
        )
    assert "as trained" in run.out(0)
    assert "as trained" not in run.out(1)


@pytest.mark.slow
def test_four_devices_continue_what_eight_began(alone, tmp_path):
    """The same losses to rounding, and said beforehand."""
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")
    with started(tmp_path, 1, devices=4) as run:
        assert run.wait() == [0]
    assert "on 4 cpu devices: fake" in run.out(0)
    assert "continuing from step 8 of 16" in run.out(0)
    assert (
        "it was saved by 8 cpu devices in 1 process: from here on numbers agree with that run's "
        "to rounding, not to the bit"
    ) in run.out(0)
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.slow
def test_every_bad_image_is_named_by_the_process_that_met_it(tmp_path):
    files = images(train=24, val=8)
    bad = sorted(files)[::4]
    broken = {name: damaged(content) for name, content in files.items() if name in bad}
    write_tree(tmp_path / "data", files | broken)
    arguments = [
        f"--config.data.source=folder:{tmp_path / 'data'}",
        "--config.data.train_size=16",
        f"--config.data.max_bad={len(bad)}",
        "--config.train.batch_size=24",
        "--config.eval.batch_size=8",
    ]
    with started(tmp_path, 2, *arguments) as run:
        assert run.wait() == [0, 0]
    met = [
        re.findall(rf"^{start}(?:training|validation) image (\S+) cannot", run.out(i), re.M)
        for i, start in enumerate(("", "process 1: "))
    ]
    assert all(met)
    assert sorted({*met[0], *met[1]}) == bad
    assert "process 0: " not in run.out(0)


@pytest.mark.slow
class TestFourProcesses:
    """Two devices each; slow, for starting and compiling four times."""

    def test_are_one_run_and_one_process_reads_what_they_saved(self, alone, tmp_path):
        with started(tmp_path, 4, "--config.train.shard_optimizer=True") as run:
            assert run.wait() == [0] * 4
        assert_same_run(alone, tmp_path / "run")

    @pytest.mark.parametrize("lost", [0, 2])
    def test_the_others_stop_when_one_is_killed_and_a_restart_is_right(self, alone, tmp_path, lost):
        path = tmp_path / "run"
        with started(tmp_path, 4) as run:
            # A checkpoint is complete, the run is not.
            run.wait_until(lambda: (path / "checkpoints" / "8").is_dir())
            run.processes[lost].kill()
            began = time.monotonic()
            statuses = run.wait()
            assert time.monotonic() - began < STATED_SECONDS
        assert statuses[lost] == -signal.SIGKILL
        for process in {0, 1, 2, 3} - {lost}:
            assert statuses[process] == 1
            last = run.err(process).splitlines()[-1]
            assert last.startswith(f"error: process {process} of 4 stops")
            assert last.endswith("start all 4 again and they continue from the last checkpoint")
        assert not (path / "checkpoints" / "16").exists()
        with started(tmp_path, 4) as run:
            assert run.wait() == [0] * 4
        assert "continuing from step 8 of 16" in run.out(0)
        assert_same_run(alone, path)

    def test_they_continue_what_one_began(self, alone, tmp_path):
        shutil.copytree(alone, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")
        with started(tmp_path, 4) as run:
            assert run.wait() == [0] * 4
        assert "continuing from step 8 of 16" in run.out(0)
        assert_same_run(alone, tmp_path / "run")

    def test_sigterm_for_one_stops_all_at_the_same_step(self, tmp_path):
        with started(tmp_path, 4, "--config.train.epochs=4000") as run:
            run.wait_until(lambda: (tmp_path / "run" / "checkpoints" / "8").is_dir())
            run.processes[3].send_signal(signal.SIGTERM)
            assert run.wait() == [0] * 4
        line = run.out(0).splitlines()[-1]
        assert line.startswith("SIGTERM at step ")
        step = line.split()[3].rstrip(":")
        assert (tmp_path / "run" / "checkpoints" / step).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("recovers", [True, False])
def test_a_save_that_fails_in_one_process_is_retried_by_both(alone, tmp_path, recovers):
    """No file of the second process may grow: its part of a checkpoint cannot be written."""
    path = tmp_path / "run"
    with started(tmp_path, 2, "--config.train.epochs=4000", devices=4) as run:
        run.wait_until((path / "checkpoints" / "8").is_dir)
        second = run.processes[1].pid
        _, most = resource.prlimit(second, resource.RLIMIT_FSIZE)
        resource.prlimit(second, resource.RLIMIT_FSIZE, (2000, most))
        if recovers:
            run.wait_until(lambda: "trying again" in run.out(0))
            resource.prlimit(second, resource.RLIMIT_FSIZE, (most, most))
            failed = int(re.search(r"with step (\d+)|$", run.out(0))[1] or 0)
            run.wait_until((path / "checkpoints" / str(failed + 8)).is_dir)
            run.processes[1].send_signal(signal.SIGTERM)
            assert run.wait() == [0, 0]
        else:
            assert run.wait() == [1, 1]
    retries = [line for line in run.out(0).splitlines() if "trying again" in line]
    assert all(re.search(r"trying again[^:]*: process 1: OUT_OF_RANGE", line) for line in retries)
    assert len(retries) >= 1 if recovers else len(retries) == 3
    if not recovers:
        for process in (0, 1):
            assert "failed 4 times; the last good checkpoint is that of" in run.err(process)


def test_two_processes_with_different_configurations(tmp_path):
    with started(tmp_path, 2, own={1: ["--config.train.epochs=3"]}) as run:
        assert run.wait() == [1, 1]
    for process in (0, 1):
        last = run.err(process).splitlines()[-1]
        assert last.startswith("error: process ")
        assert (
            "process 1 was started differently from process 0: config.train.epochs: 2 -> 3; "
            "start all with the same command on the same versions"
        ) in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_in_vain_says_so(tmp_path, process):
    where = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    with started(
        tmp_path, 1, f"--distributed={where},2,{process}", "--distributed_timeout=3"
    ) as run:
        assert run.wait() == [1]
    assert time.monotonic() - began < 60
    assert run.err(0).startswith(
        f"error: process {process} of 2 waited 3 s for the others at {where} and not all came"
    )
    assert run.err(0).count("\n") == 1


def test_batches_that_cannot_be_split_over_processes():
    config = recipe()
    config.train.batch_size = 100
    with pytest.raises(ValueError, match=r"=100 .* 8 devices \(4 processes of 2\).*: 96 or 104"):
        check_batches(Settings.from_config(config), devices=8, processes=4)
