"""Several processes as one run. The processes are real, each with its own CPU devices.

What needs one process only is in test_cluster.py and test_checkpoint.py.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.validate import check_batches
from tests.helpers.flags import xla_flags
from tests.helpers.pictures import damaged, images, write_tree
from tests.helpers.processes import FLOAT64, RECIPE, ROOT, SEGMENTER64, free_port, started

pytestmark = pytest.mark.system


def recipe():
    namespace: dict = {}
    exec(RECIPE, namespace)
    return namespace["get_config"]()


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def final_variables(path: pathlib.Path):
    """The step and the variables of a run of the recipe in float64."""
    with jax.enable_x64(True), Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.restore_variables()


def distance(tree, other) -> float:
    """Euclidean distance of two trees, relative to the norm of the first."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
    apart = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(a.astype(np.float64) ** 2)) for a, _ in pairs)) ** 0.5


def assert_same_run(path: pathlib.Path, other: pathlib.Path, steps: int = 16) -> None:
    """Losses and parameters to ten digits of float64; sums over devices are in another order."""
    table = [
        [(r["step"], k, v) for r in rows(p) for k, v in r.items() if k.endswith("loss")]
        for p in (path, other)
    ]
    assert [row[:2] for row in table[0]] == [row[:2] for row in table[1]]
    np.testing.assert_allclose(
        [row[2] for row in table[1]], [row[2] for row in table[0]], rtol=1e-10
    )
    (step, variables), (other_step, others) = final_variables(path), final_variables(other)
    assert step == other_step == steps
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float64"}
    assert distance(variables["params"], others["params"]) <= 1e-10
    assert distance(variables["batch_stats"], others["batch_stats"]) <= 1e-10


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run by one process that drives all eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    with started(folder, 1, devices=8, recipe=FLOAT64) as run:
        assert run.wait() == [0]
    return folder / "run"


@pytest.mark.slow
def test_two_processes_are_one_run(alone, tmp_path):
    with started(tmp_path, 2, devices=4, launcher="slurm", recipe=FLOAT64) as run:
        assert run.wait() == [0, 0]
    for process in (0, 1):
        first = run.out(process).splitlines()[0]
        assert first == (
            f"process {process}: 4 of 8 devices, 2 processes; global batch 64 = 32 per process = "
            "8 per device; batch normalization over 64"
        )
        assert run.err(process) == ""
    assert "step 16/16" in run.out(0)
    assert "step" not in run.out(1)
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_segment_as_one(tmp_path):
    """The same losses and parameters, and the same confusion matrix of all pixels."""
    for name, count, devices in (("alone", 1, 4), ("two", 2, 2)):
        with started(tmp_path / name, count, devices=devices, recipe=SEGMENTER64) as run:
            assert run.wait() == [0] * count
    alone, two = tmp_path / "alone" / "run", tmp_path / "two" / "run"
    assert_same_run(alone, two, steps=8)
    scores = [
        [(row["step"], key, row[key]) for row in rows(path) for key in row if "miou" in key]
        for path in (alone, two)
    ]
    assert len(scores[0]) == 4  # two evaluations, and both forms at the end
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_two_processes_evaluate(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    with started(tmp_path, 2, "--eval_only", devices=4, launcher="open mpi", recipe=FLOAT64) as run:
        assert run.wait() == [0, 0]
    for process in (0, 1):
        first = run.out(process).splitlines()[0]
        assert first.startswith(f"process {process}: 4 of 8 devices")
        assert "normalization" not in first
    assert "as trained" in run.out(0)
    assert "as trained" not in run.out(1)
    # Both know every image; one writes.
    assert "written to" not in run.out(1)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    losses = [row["loss"] for row in found["worst"]]
    assert len(losses) == found["total"] == 100
    assert np.mean(losses) == pytest.approx(found["fused"]["loss"], rel=1e-6)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_four_devices_continue_what_eight_began(alone, tmp_path):
    """The same losses up to rounding, which is said beforehand."""
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")
    with started(tmp_path, 1, devices=4, recipe=FLOAT64) as run:
        assert run.wait() == [0]
    assert "resuming from step 8 of 16" in run.out(0)
    assert re.search("saved by 8 cpu devices in 1 process.*rounding", run.out(0))
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
        re.findall(rf"^process {i}: (?:training|validation) image (\S+) cannot", run.err(i), re.M)
        for i in (0, 1)
    ]
    assert all(met)
    assert sorted({*met[0], *met[1]}) == bad


# train.py, except that processes wait for a lost one for 20 s instead of a minute, and before they
# try again to save for 1, 2 and 3 s.
IMPATIENT = """
import functools, pathlib
from repvgg_jax.cluster import initialize
from repvgg_jax.train import command, loop

initialize.initialized = functools.partial(initialize.initialized, heartbeat_timeout=20.0)
loop.Checkpoints = functools.partial(loop.Checkpoints, pause=1.0)
command.run(pathlib.Path("train.py"))
"""


@pytest.mark.slow
class TestSeveralProcesses:
    """Two devices each; slow, for starting and compiling several times."""

    @pytest.mark.parametrize(("count", "lost"), [(2, 0), (4, 2)])
    def test_the_others_stop_when_one_is_killed_and_a_restart_is_right(
        self, alone, tmp_path, count, lost
    ):
        """Process 0 holds the store, so its loss is noticed in another way.

        The optimizer state is sharded over all devices.
        """
        path, sharded = tmp_path / "run", "--config.train.shard_optimizer=True"
        arguments = ["--config=recipe.py", sharded]
        with started(tmp_path, count, *arguments, program=IMPATIENT, recipe=FLOAT64) as run:
            # A checkpoint is complete, the run is not.
            run.wait_until(lambda: (path / "checkpoints" / "8").is_dir())
            run.processes[lost].kill()
            statuses = run.wait()  # with a limit far below the timeouts of collectives and Orbax
        assert statuses[lost] == -signal.SIGKILL
        for process in set(range(count)) - {lost}:
            assert statuses[process] == 1
            # A thread of gRPC may still report the lost connection after it.
            (last,) = (line for line in run.err(process).splitlines() if line.startswith("error: "))
            assert last.startswith(f"error: process {process} of {count} stops")
            assert last.endswith(
                f"start all {count} again and they continue from the last checkpoint"
            )
        assert not (path / "checkpoints" / "16").exists()
        if lost == 0:
            return  # a restart needs what is on disk, which does not depend on who was killed
        with started(tmp_path, 1, sharded, devices=8, recipe=FLOAT64) as run:
            assert run.wait() == [0]
        assert "resuming from step 8 of 16" in run.out(0)
        assert_same_run(alone, path)

    def test_they_continue_what_one_began_and_one_reads_what_they_saved(self, alone, tmp_path):
        shutil.copytree(alone, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")
        with started(tmp_path, 4, recipe=FLOAT64) as run:
            assert run.wait() == [0] * 4
        assert "resuming from step 8 of 16" in run.out(0)
        assert_same_run(alone, tmp_path / "run")

    def test_sigterm_for_one_stops_all_at_the_same_step(self, tmp_path):
        with started(tmp_path, 2, "--config.train.epochs=4000") as run:
            run.wait_until(lambda: (tmp_path / "run" / "checkpoints" / "8").is_dir())
            run.processes[1].send_signal(signal.SIGTERM)
            assert run.wait() == [0] * 2
        step = re.search(r"SIGTERM at step (\d+)", run.out(0).splitlines()[-1])[1]
        assert (tmp_path / "run" / "checkpoints" / step).is_dir()


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_is_retried_by_both(tmp_path):
    """No file of the second process may grow: its part of a checkpoint cannot be written.

    The first time only for a while, then for good. Its part is half of the optimizer's state.
    """
    path = tmp_path / "run"
    overrides = ["--config.train.epochs=4000", "--config.train.shard_optimizer=True"]
    arguments = ["--config=recipe.py", *overrides]
    with started(tmp_path, 2, *arguments, devices=4, program=IMPATIENT) as run:
        run.wait_until((path / "checkpoints" / "8").is_dir)
        second = run.processes[1].pid
        _, most = resource.prlimit(second, resource.RLIMIT_FSIZE)
        resource.prlimit(second, resource.RLIMIT_FSIZE, (2000, most))
        run.wait_until(lambda: "trying again" in run.err(0))
        resource.prlimit(second, resource.RLIMIT_FSIZE, (most, most))
        failed = int(re.search(r"with step (\d+)|$", run.err(0))[1] or 0)
        run.wait_until((path / "checkpoints" / str(failed + 8)).is_dir)
        recovered = run.err(0).count("trying again")
        resource.prlimit(second, resource.RLIMIT_FSIZE, (2000, most))
        assert run.wait() == [1, 1]
    retries = [line for line in run.err(0).splitlines() if "trying again" in line]
    # Which write meets the limit first, Orbax's or our own, differs between attempts.
    full = r"trying again[^:]*: process 1: .*(OUT_OF_RANGE|\[Errno 27\])"
    assert all(re.search(full, line) for line in retries)
    assert len(retries) == recovered + 3
    for process in (0, 1):
        assert re.search(r"failed 4 times; .*checkpoint is that of", run.err(process))


@pytest.mark.slow
def test_a_host_without_an_address_is_no_obstacle_on_one_machine(tmp_path):
    """The processes are in a namespace where the host has a name that nothing resolves."""
    script = f"""
hostname no-such-host.invalid
for process in 0 1; do
  {sys.executable} {ROOT}/train.py --config=recipe.py --workdir=run \
    --distributed=127.0.0.1:{free_port()},2,$process 2> $process.err > $process.out || exit 1 &
done
wait %1 && wait %2
"""
    (tmp_path / "recipe.py").write_text(RECIPE)
    apart = ["unshare", "--user", "--map-root-user", "--uts"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("this machine has no namespaces")
    done = subprocess.run(
        [*apart, "sh", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(2)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (tmp_path / "0.err").read_text()
    assert "fused (" in (tmp_path / "0.out").read_text()


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


@pytest.mark.slow
def test_processes_that_wait_in_vain_say_so(tmp_path):
    """Process 0 waits for the others, process 1 for process 0; each of another run here."""
    with contextlib.ExitStack() as stack:
        runs = []
        for process in (0, 1):
            where = f"127.0.0.1:{free_port()}"
            arguments = [f"--distributed={where},2,{process}", "--distributed_timeout=3"]
            run = stack.enter_context(started(tmp_path / str(process), 1, *arguments))
            runs.append((process, where, run))
        for process, where, run in runs:
            assert run.wait() == [1]
            assert f"process {process} of 2 waited 3 s" in run.err(0)
            assert f" at {where} " in run.err(0)
            assert run.err(0).count("\n") == 1


SAVE_AND_READ = """
import pathlib, sys, traceback
import chex, jax
from repvgg_jax.cluster.initialize import initialized
from repvgg_jax.train.checkpoint import Checkpoints
from tests.helpers.states import make_state

def explain(error):
    traceback.print_exception(error)
    return 1

with initialized(sys.argv[-1].partition("=")[2], timeout=100, explain=explain):
    with Checkpoints(pathlib.Path("checkpoints")) as checkpoints:
        for step in (3, 5):
            checkpoints.save(make_state(step, average=True), wait=True)
        for wanted, step in ((None, 5), (3, 3)):
            found, variables = checkpoints.restore_variables(wanted)
            assert found == step
            like = jax.device_get(make_state(step, average=True).ema)
            chex.assert_trees_all_equal(variables, like)
        print("read by process", jax.process_index())
"""


@pytest.mark.slow
def test_variables_are_restored_in_every_process(tmp_path):
    """The optimizer state is sharded over both."""
    with started(tmp_path, 2, devices=4, program=SAVE_AND_READ) as run:
        assert run.wait() == [0, 0]
    for process in (0, 1):
        assert f"read by process {process}" in run.out(process)


def test_batches_that_cannot_be_split_over_processes():
    config = recipe()
    config.train.batch_size = 100
    with pytest.raises(ValueError, match=r"=100 .* 8 devices \(4 processes of 2\).*: 96 or 104"):
        check_batches(Settings.from_config(config), devices=8, processes=4)
