"""Many processes as one run. The processes are real, each with its own CPU devices."""

import dataclasses
import itertools
import json
import pathlib
import re
import resource
import shutil
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.cluster import consensus as distributed
from repvgg_jax.cluster import watchdog as watch_module
from repvgg_jax.cluster.process_info import Place, launched_place
from repvgg_jax.cluster.watchdog import PATIENCE, Watch
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.config import check
from repvgg_jax.train.run import Run
from tests.helpers.pictures import damaged, images, write_tree
from tests.processes import FLOAT64, RECIPE, TIMEOUT, free_port, started


def recipe():
    namespace: dict = {}
    exec(RECIPE, namespace)
    return namespace["get_config"]()


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def final_state(path: pathlib.Path):
    """That of a run of the recipe in float64."""
    with jax.enable_x64(True), Checkpoints(path / "checkpoints") as checkpoints:
        run = Run.from_config(recipe())
        model = run.model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        like = dataclasses.replace(run, model=model).abstract_state()
        return jax.device_get(checkpoints.restore(like))


def distance(tree, other) -> float:
    """Euclidean distance of two trees, relative to the norm of the first."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
    apart = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(a.astype(np.float64) ** 2)) for a, _ in pairs)) ** 0.5


def assert_same_run(path: pathlib.Path, other: pathlib.Path) -> None:
    """Losses and parameters to ten digits of float64; sums over devices are in another order."""
    table = [
        [(r["step"], k, v) for r in rows(p) for k, v in r.items() if k.endswith("loss")]
        for p in (path, other)
    ]
    assert [row[:2] for row in table[0]] == [row[:2] for row in table[1]]
    np.testing.assert_allclose(
        [row[2] for row in table[1]], [row[2] for row in table[0]], rtol=1e-10
    )
    state, others = final_state(path), final_state(other)
    assert int(state.step) == int(others.step) == 16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.variables)} == {"float64"}
    assert distance(state.params, others.params) <= 1e-10
    assert distance(state.batch_stats, others.batch_stats) <= 1e-10


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run by one process that drives all eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    with started(folder, 1, devices=8, recipe=FLOAT64) as run:
        assert run.wait() == [0]
    return folder / "run"


@pytest.mark.parametrize("launcher", ["slurm", pytest.param("open mpi", marks=pytest.mark.slow)])
def test_two_processes_are_one_run(alone, tmp_path, launcher):
    with started(tmp_path, 2, devices=4, launcher=launcher, recipe=FLOAT64) as run:
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
    with started(tmp_path, 2, "--eval_only", devices=4, recipe=FLOAT64) as run:
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
    with started(tmp_path, 1, devices=4, recipe=FLOAT64) as run:
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
        with started(tmp_path, 4, "--config.train.shard_optimizer=True", recipe=FLOAT64) as run:
            assert run.wait() == [0] * 4
        assert_same_run(alone, tmp_path / "run")

    @pytest.mark.parametrize("lost", [0, 2])
    def test_the_others_stop_when_one_is_killed_and_a_restart_is_right(self, alone, tmp_path, lost):
        path = tmp_path / "run"
        with started(tmp_path, 4, recipe=FLOAT64) as run:
            # A checkpoint is complete, the run is not.
            run.wait_until(lambda: (path / "checkpoints" / "8").is_dir())
            run.processes[lost].kill()
            statuses = run.wait()  # a collective would wait for the lost one for longer than this
        assert statuses[lost] == -signal.SIGKILL
        for process in {0, 1, 2, 3} - {lost}:
            assert statuses[process] == 1
            last = run.err(process).splitlines()[-1]
            assert last.startswith(f"error: process {process} of 4 stops")
            assert last.endswith("start all 4 again and they continue from the last checkpoint")
        assert not (path / "checkpoints" / "16").exists()
        with started(tmp_path, 4, recipe=FLOAT64) as run:
            assert run.wait() == [0] * 4
        assert "continuing from step 8 of 16" in run.out(0)
        assert_same_run(alone, path)

    def test_they_continue_what_one_began(self, alone, tmp_path):
        shutil.copytree(alone, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")
        with started(tmp_path, 4, recipe=FLOAT64) as run:
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
def test_a_save_that_fails_in_one_process_is_retried_by_both(tmp_path, recovers):
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
    with started(
        tmp_path, 1, f"--distributed={where},2,{process}", "--distributed_timeout=3"
    ) as run:
        assert run.wait() == [1]  # within 300 s, which is how long it would wait by default
    assert run.err(0).startswith(
        f"error: process {process} of 2 waited 3 s for the others at {where} and not all came"
    )
    assert run.err(0).count("\n") == 1


class TestPlace:
    def test_parsing(self):
        place = Place.parse("[::1]:1234,4,3")
        assert place == ("[::1]:1234", 4, 3, None)

    @pytest.mark.parametrize(
        "text", ["", "host", "host,2,0", "host:x,2,0", ":1,2,0", "host:1,2,2", "host:99999,2,0"]
    )
    def test_what_it_is_not(self, text):
        with pytest.raises(ValueError, match=r"is not HOST:PORT,PROCESSES,PROCESS.*10\.0\.0\.1"):
            Place.parse(text)


OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "prterun-node-7@1",
}
ACROSS = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3"}
SRUN = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "a[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
SBATCH = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}


class TestLaunchers:
    @pytest.mark.parametrize(
        "environment", [OPEN_MPI, {**SBATCH, **OPEN_MPI}, {**SRUN, "SLURM_NTASKS": "2", **OPEN_MPI}]
    )
    def test_open_mpi_5_on_one_machine(self, environment):
        place = launched_place(environment)
        assert (place.processes, place.process, place.device) == (4, 1, 1)
        host, port = place.coordinator.split(":")
        assert host == "127.0.0.1"
        assert 61440 <= int(port) < 65536
        other = {**environment, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
        assert launched_place(other).coordinator == place.coordinator
        next_job = {**environment, "PMIX_NAMESPACE": "prterun-node-8@1"}
        assert launched_place(next_job).coordinator != place.coordinator

    def test_what_says_where(self):
        given = {**ACROSS, "JAX_COORDINATOR_ADDRESS": "node1:1234"}
        assert launched_place(given) == ("node1:1234", 4, 1, 1)
        given = {**HYDRA, "JAX_COORDINATOR_PORT": "1234", "JAX_LOCAL_DEVICE_IDS": "0,1"}
        assert launched_place(given) == ("127.0.0.1:1234", 4, 3, None)

    @pytest.mark.parametrize(
        "environment",
        [
            {},
            {"SLURM_NTASKS": "4"},  # a shell of an allocation
            SRUN,
            {**SRUN, "PMI_SIZE": "4", "PMI_RANK": "3"},
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"},
        ],
    )
    def test_what_is_left_to_jax(self, environment):
        assert launched_place(environment) is None

    @pytest.mark.parametrize(
        "environment",
        [
            {**SRUN, "SLURM_NTASKS": "1"},
            {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            {**SBATCH, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        ],
    )
    def test_one_process(self, environment):
        assert launched_place(environment).processes == 1

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            (
                ACROSS,
                r"^Open MPI says that this is process 1 of 4 \(OMPI_COMM_WORLD_SIZE=4\), but not "
                r"where process 0 is; say --distributed=HOST:PORT,4,1, or set JAX_COORD",
            ),
            ({"SLURM_NTASKS": "1", **ACROSS}, "^Open MPI says that this is process 1 of 4"),
            ({"PMI_SIZE": "2", "PMI_RANK": "0"}, r"^MPICH .* --distributed=HOST:PORT,2,0, "),
            ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}, "^MVAPICH .*PORT,2,1, "),
            ({"WORLD_SIZE": "16", "RANK": "9", "LOCAL_WORLD_SIZE": "8"}, "^torchrun .* 9 of 16 "),
            (SBATCH, r"^SLURM speaks of 4 processes .*; start it by srun, or say --distributed="),
        ],
    )
    def test_others_that_nobody_could_find(self, environment, message):
        with pytest.raises(ValueError, match=message) as caught:
            launched_place(environment)
        assert "\n" not in str(caught.value)

    def test_a_launcher_that_does_not_say_where_starts_no_runs(self, tmp_path, monkeypatch):
        for name, value in ACROSS.items():
            monkeypatch.setenv(name, value)
        with started(tmp_path, 1) as run:
            assert run.wait() == [1]
        assert run.err(0).startswith("error: Open MPI says that this is process 1 of 4 ")
        assert run.err(0).count("\n") == 1
        assert not (tmp_path / "run").exists()

    def test_one_process_alone_whatever_the_launcher_says(self, tmp_path, monkeypatch):
        for name, value in SBATCH.items():
            monkeypatch.setenv(name, value)
        with started(tmp_path, 1, "--distributed=localhost:1234,1,0") as run:
            assert run.wait() == [0]
        assert "on 2 cpu devices: fake" in run.out(0)


def test_the_lines_that_the_page_on_launching_promises(monkeypatch):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "launch.md").read_text()
    lines = re.findall(r"^process .*$", page, re.M)
    assert len(lines) == 3
    for line in lines:
        process, processes, local, devices, batch, *_, group = map(int, re.findall(r"\d+", line))
        assert local * processes == devices
        place = {
            "process_index": process,
            "process_count": processes,
            "local_device_count": local,
            "device_count": devices,
        }
        for name, value in place.items():
            monkeypatch.setattr(jax, name, lambda value=value: value)
        assert distributed.describe_batch(batch_size=batch, group_size=group) == line


def test_batches_that_cannot_be_split_over_processes():
    config = recipe()
    config.train.batch_size = 100
    with pytest.raises(ValueError, match=r"=100 .* 8 devices \(4 processes of 2\).*: 96 or 104"):
        check(config, devices=8, processes=4)


class Table:
    """The store that processes share, here in one."""

    def __init__(self):
        self.content, self.lock = {}, threading.Lock()

    def put(self, key, value):
        with self.lock:
            self.content[key] = value

    def entries(self):
        with self.lock:
            return dict(self.content)


class TestWatch:
    """By a clock of their own, whatever else this machine does."""

    @pytest.fixture(autouse=True)
    def _clock(self, monkeypatch):
        self.now = 0.0
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(watch_module, "time", clock)

    def three(self, interval):
        """Three whose threads look every `interval` seconds of the real clock."""
        table, self.lost = Table(), []
        return [
            Watch(
                table,
                process=i,
                processes=3,
                interval=interval,
                on_loss=lambda what, i=i: self.lost.append((i, what)),
            )
            for i in range(3)
        ]

    @pytest.fixture
    def watches(self):
        """Their threads never look of themselves."""
        return self.three(interval=1e6)

    def test_one_that_falls_silent_is_missed(self, watches):
        for watch in watches:
            watch.look()
        for self.now in np.linspace(1, PATIENCE - 1):
            watches[1].look()
            watches[2].look()
        assert self.lost == []
        self.now = PATIENCE + 1
        watches[1].look()
        assert self.lost == [(1, f"process 0 of 3 is gone: no sign of life for {PATIENCE:.0f} s")]

    def test_one_that_said_goodbye_is_not(self, watches):
        for watch in watches:
            watch.start()
            watch.look()
        watches[2].close()
        for self.now in np.linspace(1, 10 * PATIENCE, 20):
            watches[0].look()
            watches[1].look()
        assert self.lost == []
        for watch in watches[:2]:
            watch.close()

    def test_one_that_fails_says_why(self, watches):
        watches[1].fail("no such data set")
        watches[0].look()
        assert self.lost == [(0, "process 1 of 3 stopped: no such data set")]
        assert watches[0].left() == {1}

    def test_they_stop_at_the_same_poll_however_far_apart_they_are(self):
        watches = self.three(interval=0.01)
        for watch in watches:
            watch.start()
        stopped = {}

        def run(number):
            for poll in itertools.count(1):
                # The first is quick, the last is slow, and the second is asked to stop.
                time.sleep(0.0005 * number)
                asked = signal.SIGTERM if number == 1 and poll == 50 else None
                if watches[number].agree_to_stop(asked):
                    stopped[number] = poll
                    return

        threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        for watch in watches:
            watch.close()
        assert len(stopped) == 3
        assert len(set(stopped.values())) == 1
        assert stopped[0] >= 50

    def test_a_signal_after_the_last_poll_of_one_stops_nobody(self, watches):
        for watch in watches:
            watch.start()
            watch.look()
            for _ in range(5):
                assert watch.agree_to_stop(None) is None
        for watch in watches[:2]:
            assert watch.agree_to_stop(None) is None
            watch.close()
        assert watches[2].agree_to_stop(signal.SIGTERM) is None
        for self.now in (1, 2 * PATIENCE):
            watches[2].look()
        watches[2].close()
        assert self.lost == []


def test_a_single_process_agrees_with_itself():
    assert distributed.agree_to_stop(None) is None
    assert distributed.agree_to_stop(signal.SIGINT) is signal.SIGINT
    assert distributed.first_says(True)
    assert not distributed.all_say(False)
