"""The cluster room, in one process: launchers, watchdog, stopping together, directory lock."""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import pathlib
import random
import re
import signal
import socket
import threading
import time

import jax
import pytest

from repvgg_jax.cluster import consensus, initialize, lock
from repvgg_jax.cluster.initialize import ProcessInfo, from_launcher, initialized
from repvgg_jax.cluster.watchdog import TIMEOUT, Watchdog, agree_to_stop

PATIENCE = 60  # seconds until a test that hangs fails


class TestProcessInfo:
    def test_parsing(self):
        assert ProcessInfo.parse("[::1]:1234,4,3") == ("[::1]:1234", 4, 3, None)

    @pytest.mark.parametrize(
        "text", ["", "host", "host,2,0", "host:x,2,0", ":1,2,0", "host:1,2,2", "host:99999,2,0"]
    )
    def test_malformed(self, text):
        with pytest.raises(ValueError, match=r"HOST:PORT,PROCESSES,PROCESS.*10\.0\.0\.1"):
            ProcessInfo.parse(text)


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
        info = from_launcher(environment)
        assert (info.num_processes, info.process_id, info.local_device_id) == (4, 1, 1)
        host, port = info.coordinator_address.split(":")
        assert host == "127.0.0.1"
        assert 61440 <= int(port) < 65536
        other = {**environment, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
        assert from_launcher(other).coordinator_address == info.coordinator_address
        next_job = {**environment, "PMIX_NAMESPACE": "prterun-node-8@1"}
        assert from_launcher(next_job).coordinator_address != info.coordinator_address

    def test_address_from_the_environment(self):
        given = {**ACROSS, "JAX_COORDINATOR_ADDRESS": "node1:1234"}
        assert from_launcher(given) == ("node1:1234", 4, 1, 1)
        given = {**HYDRA, "JAX_COORDINATOR_PORT": "1234", "JAX_LOCAL_DEVICE_IDS": "0,1"}
        assert from_launcher(given) == ("127.0.0.1:1234", 4, 3, None)

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
    def test_left_to_jax(self, environment):
        assert from_launcher(environment) is None

    @pytest.mark.parametrize(
        "environment",
        [
            {**SRUN, "SLURM_NTASKS": "1"},
            {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            {**SBATCH, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        ],
    )
    def test_single_process(self, environment):
        assert from_launcher(environment).num_processes == 1

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            (ACROSS, r"^Open MPI .* 1 of 4 \(OMPI_COMM_WORLD_SIZE=4\).*HOST:PORT,4,1.*JAX_COORD"),
            ({"SLURM_NTASKS": "1", **ACROSS}, "^Open MPI .* 1 of 4"),
            ({"PMI_SIZE": "2", "PMI_RANK": "0"}, r"^MPICH .*HOST:PORT,2,0"),
            ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}, "^MVAPICH .*PORT,2,1"),
            ({"WORLD_SIZE": "16", "RANK": "9", "LOCAL_WORLD_SIZE": "8"}, "^torchrun .* 9 of 16"),
            (SBATCH, r"^SLURM has 4 processes .*srun.*--distributed="),
        ],
    )
    def test_without_an_address(self, environment, message):
        with pytest.raises(ValueError, match=message) as caught:
            from_launcher(environment)
        assert "\n" not in str(caught.value)


class TestInitialized:
    """What is decided before any other process is waited for."""

    def enter(self, distributed):
        with initialized(distributed, timeout=1, explain=lambda error: 1):
            return consensus.client(), jax.process_count()

    def test_launcher_without_an_address_starts_no_runs(self, monkeypatch):
        for name, value in ACROSS.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=r"Open MPI .* 1 of 4"):
            self.enter(None)

    def test_single_process_whatever_the_launcher_says(self, monkeypatch):
        for name, value in SBATCH.items():
            monkeypatch.setenv(name, value)
        assert self.enter("localhost:1234,1,0") == (None, 1)

    def test_taken_port(self):
        with socket.socket() as server:
            server.bind(("", 0))
            server.listen()
            port = server.getsockname()[1]
            with pytest.raises(OSError, match=rf"port {port} .*another"):
                self.enter(f"127.0.0.1:{port},2,0")


def test_single_process_agrees_with_itself():
    assert agree_to_stop(None) is None
    assert agree_to_stop(signal.SIGINT) is signal.SIGINT
    assert consensus.broadcast(True)
    assert not consensus.all_true(False)
    assert consensus.gather("question", "answer") == ["answer"]
    consensus.barrier("here")
    consensus.require_same({"seed": 0})


def test_lines_of_the_page_on_launching(monkeypatch):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "launch.md").read_text()
    lines = re.findall(r"^process \d+: .*$", page, re.M)
    assert len(lines) == 3
    for line in lines:
        process, local, devices, processes, batch, *_ = map(int, re.findall(r"\d+", line))
        assert local * processes == devices
        numbers = {
            "process_count": processes,
            "local_device_count": local,
            "device_count": devices,
        }
        for name, value in numbers.items():
            monkeypatch.setattr(jax, name, lambda value=value: value)
        details = line.rpartition("; ")[2]
        share = consensus.describe_share(batch_size=batch, details=details)
        assert line == f"process {process}: {share}"  # the handler of the command line adds that


class Table:
    """A store in this process."""

    def __init__(self):
        self.content, self.lock = {}, threading.Lock()

    def put(self, key, value):
        with self.lock:
            self.content[key] = value

    def entries(self):
        with self.lock:
            return dict(self.content)


class TestWatchdog:
    """Driven by hand, at times that the tests state."""

    @pytest.fixture(autouse=True)
    def _table(self):
        self.now, self.lost, self.table = 0.0, [], Table()

    def watchdog(self, number, **options):
        options = {"on_loss": lambda what: self.lost.append((number, what)), **options}
        clock = {"clock": lambda: self.now}
        return Watchdog(self.table, process_id=number, num_processes=3, **clock, **options)

    @pytest.fixture
    def watchdogs(self):
        return [self.watchdog(i) for i in range(3)]

    def test_silent_process_is_lost(self, watchdogs):
        for watchdog in watchdogs:
            watchdog.check()
        for self.now in (TIMEOUT / 2, TIMEOUT - 1):
            watchdogs[1].check()
            watchdogs[2].check()
        assert self.lost == []
        self.now = TIMEOUT + 1
        watchdogs[1].check()
        assert self.lost == [(1, "process 0 of 3 is gone: no heartbeat for 60 s")]

    def test_after_a_hint_it_is_lost_sooner(self, watchdogs):
        watchdogs[0].check()
        watchdogs[1].check()
        watchdogs[1].shorten_timeout(5.0)
        self.now = 6.0
        watchdogs[1].check()
        assert len(self.lost) == 1
        assert "no heartbeat for 5 s" in self.lost[0][1]

    def test_finished_process_is_not_lost(self, watchdogs):
        for watchdog in watchdogs:
            watchdog.check()
        watchdogs[2].close()
        for self.now in (TIMEOUT - 1, 2 * TIMEOUT - 2, 3 * TIMEOUT - 3):
            watchdogs[0].check()
            watchdogs[1].check()
        assert self.lost == []
        assert watchdogs[0].finished() == {2}

    def test_failing_process_says_why(self, watchdogs):
        watchdogs[1].fail("no such data set")
        watchdogs[0].check()
        assert self.lost == [(0, "process 1 of 3 stopped: no such data set")]
        assert watchdogs[0].finished() == {1}

    def test_thread_checks_until_it_is_closed(self):
        called = threading.Event()
        first = self.watchdog(0, interval=0.001, on_loss=lambda what: called.set())
        first.start()
        while int(self.table.entries().get("0/beat", 0)) < 3:
            time.sleep(0.001)
        self.table.put("1/failure", "no such data set")
        assert called.wait(PATIENCE)
        first.close()
        assert self.table.entries()["0/beat"] == "done"

    def test_store_that_is_gone(self):
        """It is in process 0."""
        called = threading.Event()

        def entries():
            raise RuntimeError("UNAVAILABLE\nconnection refused")

        self.table.entries = entries

        def on_loss(what):
            self.lost.append(what)
            called.set()

        self.watchdog(1, interval=0.001, on_loss=on_loss).start()
        assert called.wait(PATIENCE)
        assert self.lost == ["process 0 of 3 does not answer: UNAVAILABLE"]

    @pytest.mark.parametrize("seed", range(20))
    def test_all_stop_at_the_same_poll_in_any_order(self, watchdogs, seed):
        """Three threads take turns as the seed says; one that has to wait loses its turns."""
        rng, asked_by = random.Random(seed), seed % 3
        speeds = [rng.uniform(0.1, 1) for _ in watchdogs]
        polls, stopped, waiting = [0, 0, 0], {}, {}

        def poll(number):
            received = signal.SIGTERM if number == asked_by and polls[number] == 10 else None
            polls[number] += 1
            answer = watchdogs[number].agree_to_stop(received)
            if answer:
                stopped[number] = (polls[number], answer)

        for _ in range(200_000):
            number = rng.choices(range(3), speeds)[0]
            if rng.random() < 0.2:
                watchdogs[number].check()
            # In this order: a thread that is not alive has said whether it stopped.
            elif not (number in waiting and waiting[number].is_alive()) and number not in stopped:
                waiting[number] = threading.Thread(target=poll, args=(number,), daemon=True)
                waiting[number].start()
                waiting[number].join(0.001)  # longer if it is to wait for a decision
            if len(stopped) == 3:
                break
        for thread in waiting.values():
            thread.join(PATIENCE)
        assert len(stopped) == 3
        assert len(set(stopped.values())) == 1
        assert stopped[0][0] > 10

    def test_process_ahead_waits_for_the_decision(self, watchdogs):
        for number, count in enumerate((7, 2, 4)):
            for _ in range(count):
                assert watchdogs[number].agree_to_stop(None) is None
        watchdogs[1].agree_to_stop(signal.SIGTERM)  # its third poll
        watchdogs[0].check()  # proposes 7 and waits for the others
        answers = []
        ahead = threading.Thread(
            target=lambda: answers.append(watchdogs[0].agree_to_stop(None)), daemon=True
        )
        ahead.start()
        for number in (1, 2, 0, 1, 2):
            watchdogs[number].check()
        ahead.join(PATIENCE)
        assert answers == [signal.SIGTERM]  # at its poll 8
        for number, count in ((1, 4), (2, 3)):
            for _ in range(count):
                assert watchdogs[number].agree_to_stop(None) is None
            assert watchdogs[number].agree_to_stop(None) is signal.SIGTERM

    def test_signal_after_the_last_poll_of_one_stops_nobody(self, watchdogs):
        for watchdog in watchdogs:
            watchdog.check()
            for _ in range(5):
                assert agree_to_stop(None) is None
        for watchdog in watchdogs[:2]:
            assert agree_to_stop(None) is None
            watchdog.close()
        assert watchdogs[2].agree_to_stop(signal.SIGTERM) is None
        for self.now in (1, 2 * TIMEOUT):
            watchdogs[2].check()
        watchdogs[2].close()
        assert self.lost == []


def changed(file):
    """The content of a file as soon as it is another one."""
    before, deadline = file.read_text(), time.monotonic() + PATIENCE
    while (now := file.read_text()) == before:
        assert time.monotonic() < deadline, "it never changed"
        time.sleep(0.001)
    return now


class TestLock:
    """A directory belongs to one run, on any machine; an owner that is gone does not block it."""

    OTHER = {"host": "far", "machine": "another", "pid": 7, "began": "2020-01-01 00:00:00 +0000"}

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / lock.FILE).write_text(json.dumps(self.OTHER))
        return tmp_path

    @pytest.fixture(autouse=True)
    def _warnings(self, caplog):
        caplog.set_level(logging.WARNING, lock.__name__)
        self.slept = 0.0

    def sleep(self, seconds):
        """The owner on another machine does nothing meanwhile."""
        self.slept += seconds

    def test_shows_that_it_is_alive_and_leaves_nothing(self, tmp_path, caplog):
        with lock.locked(tmp_path, heartbeat=0.001):
            first = (tmp_path / lock.FILE).read_text()
            assert json.loads(first)["pid"] == os.getpid()
            assert len(changed(tmp_path / lock.FILE)) == len(first)
        assert (list(tmp_path.iterdir()), caplog.messages) == ([], [])

    def test_owner_alive_on_another_machine_is_respected(self, path):
        beats = itertools.count()

        def other_writes(seconds):
            content = {**self.OTHER, "beat": next(beats)}
            (path / lock.FILE).write_text(json.dumps(content))

        with (
            pytest.raises(ValueError, match=r"in use by process 7 on far, .* 2020"),
            lock.locked(path, sleep=other_writes),
        ):
            pytest.fail("it was taken")
        assert json.loads((path / lock.FILE).read_text())["host"] == "far"

    def test_owner_that_ends_meanwhile(self, path, caplog):
        with lock.locked(path, sleep=lambda seconds: (path / lock.FILE).unlink()):
            assert json.loads((path / lock.FILE).read_text())["pid"] == os.getpid()
        assert not any("takes over" in line for line in caplog.messages)

    @pytest.mark.parametrize("content", [json.dumps(OTHER).encode(), b"\xff{"])
    def test_owner_that_is_gone_is_succeeded(self, path, caplog, content):
        (path / lock.FILE).write_bytes(content)
        with lock.locked(path, sleep=self.sleep):
            assert json.loads((path / lock.FILE).read_text())["pid"] == os.getpid()
        assert self.slept == pytest.approx(lock.TIMEOUT)
        assert lock.TIMEOUT > 2 * lock.HEARTBEAT
        assert len(caplog.messages) == 2
        assert "takes over" in caplog.messages[1]

    def test_killed_on_this_machine_is_succeeded_at_once(self, path, caplog):
        here = {**self.OTHER, "machine": lock.machine_id()}
        (path / lock.FILE).write_text(json.dumps(here))
        with lock.locked(path, sleep=self.sleep):
            assert (self.slept, caplog.messages) == (0, [])

    def test_second_run_on_this_machine(self, tmp_path):
        with (
            lock.locked(tmp_path),
            pytest.raises(ValueError, match=r"in use by another run on this machine"),
            lock.locked(tmp_path),
        ):
            pytest.fail("it was taken")
        with lock.locked(tmp_path):
            pass  # it is free afterwards

    def test_heart_beats_on_after_an_error(self, tmp_path, monkeypatch, caplog):
        read, errors = lock._read, iter([errno.ESTALE, errno.EIO])

        def flaky(file):
            if threading.current_thread() is not threading.main_thread():
                for number in errors:
                    raise OSError(number, os.strerror(number))
            return read(file)

        monkeypatch.setattr(lock, "_read", flaky)
        with lock.locked(tmp_path, heartbeat=0.001):
            changed(tmp_path / lock.FILE)
        assert next(errors, None) is None
        assert list(tmp_path.iterdir()) == []
        (warning,) = caplog.messages
        assert "a heartbeat is left out" in warning
        assert os.strerror(errno.ESTALE) in warning

    def test_error_at_the_end_hides_no_other(self, tmp_path, monkeypatch):
        def stale(file):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        def fail():
            with lock.locked(tmp_path):
                monkeypatch.setattr(lock, "_read", stale)
                raise KeyError("of the run")

        with pytest.raises(KeyError, match="of the run"):
            fail()

    @pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
    def test_without_flock_the_file_decides(self, tmp_path, monkeypatch, caplog, error):
        def flock(*_):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(fcntl, "flock", flock)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock.locked(tmp_path, heartbeat=0.001))
            assert len(caplog.messages) == 1
            assert "without locks" in caplog.messages[0]
            with (
                pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on "),
                lock.locked(tmp_path, sleep=lambda seconds: changed(tmp_path / lock.FILE)),
            ):
                pytest.fail("it was taken")


def test_host_without_an_address_is_named(monkeypatch):
    def getaddrinfo(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    registered = []
    monkeypatch.setattr(
        initialize, "register_backend_factory", lambda *a, **_: registered.append(a)
    )
    for address in ("10.0.0.1:1234", "node1:1234", "[fe80::1]:1234", None):
        monkeypatch.setattr(consensus.global_state, "coordinator_address", address)
        with pytest.raises(OSError, match=rf"own name '{socket.gethostname()}'.*/etc/hosts"):
            initialize.check_host_name()
    assert not registered
    for count, address in enumerate(("127.0.0.1:1", "localhost:1", "[::1]:1"), 1):
        monkeypatch.setattr(consensus.global_state, "coordinator_address", address)
        initialize.check_host_name()
        assert len(registered) == count
