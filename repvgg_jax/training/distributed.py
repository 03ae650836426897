"""Many processes as one run: they join, compare what they were started with, and leave.

Each process drives its own devices and all run the same program. Everything here does nothing,
or the obvious, where there is one process.
"""

import collections
import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from repvgg_jax.training.config import differences
from repvgg_jax.training.watch import PATIENCE, Watch

_SPACE = "repvgg_jax"
_VERSIONS = ("repvgg-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

_GRACE = 5.0  # seconds in which processes that stop tell each other why

_watch: Watch | None = None  # of this process, while it is one of many


class Place(NamedTuple):
    """This process's place among others.

    Attributes:
      coordinator: HOST:PORT where process 0 is waited for.
      processes: how many there are.
      process: which one this is, from 0.
    """

    coordinator: str
    processes: int
    process: int

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Reads HOST:PORT,PROCESSES,PROCESS.

        Raises:
          ValueError: it is not of that form.
        """
        try:
            coordinator, processes, process = text.split(",")
            host, port = coordinator.rsplit(":", 1)
            place = cls(coordinator, int(processes), int(process))
            sound = host and 0 < int(port) < 65536 and 0 <= place.process < place.processes
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(
                f"--distributed={text} is not HOST:PORT,PROCESSES,PROCESS with PROCESS from 0 to "
                "PROCESSES-1; the second of four: --distributed=10.0.0.1:1234,4,1"
            )
        return place


@contextlib.contextmanager
def joined(
    place: str | None,
    *,
    timeout: float,
    explain: Callable[[BaseException], int],
    patience: float = PATIENCE,
) -> Iterator[None]:
    """Makes this process one of a run's, where it was started as one; a context.

    To be entered before jax looks for devices. An error inside is told to the other
    processes, and ends this one here: the interpreter's own way out would wait for them.

    Args:
      place: HOST:PORT,PROCESSES,PROCESS; None takes what a TPU pod, SLURM, Open MPI or
        Kubernetes says, and where nothing does there is one process.
      timeout: seconds to wait for all processes.
      explain: prints an error, returns the exit status.
      patience: seconds without a sign of life after which a process counts as lost.

    Raises:
      ValueError: `place` is malformed.
      OSError: the port is taken.
    """
    global _watch
    if not _join(place, timeout):
        yield
        return
    process, processes = _numbers()
    name = f"process {process} of {processes}"
    again = f"start all {processes} again and they continue from the last checkpoint"
    watch = Watch(
        _CoordinationService(),
        process=process,
        processes=processes,
        patience=patience,
        on_loss=lambda what: _lost(f"error: {name} stops, because {what}; {again}"),
    )
    _watch = watch
    watch.start()
    try:
        with _last_words(f"error: {name} stops: it has lost the others, see above; {again}\n"):
            try:
                yield
            except BaseException as error:
                _fail(error, watch, explain, name, again)
            watch.close()
            jax.distributed.shutdown()
    finally:
        _watch = None


def require_same(settings: Mapping[str, Any]) -> None:
    """Makes sure that all processes were started with the same settings and versions.

    Args:
      settings: plain values, by name.

    Raises:
      ValueError: they were not, in every process: which one differs from process 0, and where.
    """
    if _watch is None:
        return
    own = {"config": settings, "versions": _versions()}
    client, (number, count) = _client(), _numbers()
    client.key_value_set(f"{_SPACE}.settings/{number}", json.dumps(own))
    # All wait for process 0's and for the verdict of each on itself.
    first = json.loads(client.blocking_key_value_get(f"{_SPACE}.settings/0", _milliseconds(60)))
    changed = [line.removeprefix(".") for line in differences(first, own, path="")]
    client.key_value_set(f"{_SPACE}.verdict/{number}", "; ".join(changed))
    for other in range(count):
        verdict = client.blocking_key_value_get(f"{_SPACE}.verdict/{other}", _milliseconds(60))
        if verdict:
            raise ValueError(
                f"process {other} was started differently from process 0: {verdict}; "
                "start all with the same command on the same versions"
            )


def describe_batch(*, batch_size: int, group_size: int) -> str:
    """What falls to this process, in a line.

    Args:
      batch_size: images of all devices together.
      group_size: images that share batch statistics.

    Raises:
      ValueError: the processes have different numbers of devices.
    """
    processes, devices = jax.process_count(), jax.device_count()
    shares = collections.Counter(device.process_index for device in jax.devices())
    if len(set(shares.values())) > 1:
        counts = ", ".join(f"process {process}: {shares[process]}" for process in sorted(shares))
        raise ValueError(f"every process needs as many devices as the others; {counts}")
    return (
        f"process {jax.process_index()} of {processes}, {jax.local_device_count()} of {devices} "
        f"devices; global batch {batch_size} = {batch_size // processes} a process = "
        f"{batch_size // devices} a device; batch normalisation over {group_size}"
    )


def agree_to_stop(received: signal.Signals | None) -> signal.Signals | None:
    """The signal to stop for, the same in all processes; see `Watch.agree_to_stop`."""
    return received if _watch is None else _watch.agree_to_stop(received)


def is_first() -> bool:
    """Whether this is process 0, which speaks for all."""
    return jax.process_index() == 0


def meet(place: str) -> None:
    """Waits for all processes, without a collective.

    Collectives have timeouts of their own, half a minute where they go through gloo, and
    processes that compile on busy machines finish further apart.

    Args:
      place: a name, used once in a run.
    """
    if _watch is not None:  # and it ends this process if one never comes
        _client().wait_at_barrier(f"{_SPACE}.{place}", _milliseconds(86400))


def first_says(answer: bool) -> bool:
    """Process 0's answer, in all processes."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def all_say(answer: bool) -> bool:
    """Whether the answer is yes in all processes."""
    if jax.process_count() == 1:
        return answer
    return bool(np.all(multihost_utils.process_allgather(np.asarray(answer))))


def all_words(question: str, word: str) -> list[str]:
    """What all processes say, by process; without a collective, so that it may take hours.

    Args:
      question: a name, used once in a run.
      word: what this process says.
    """
    if jax.process_count() == 1:
        return [word]
    put(f"{question}/{jax.process_index()}", word)
    return [
        _client().blocking_key_value_get(f"{_SPACE}.{question}/{process}", _milliseconds(86400))
        for process in range(jax.process_count())
    ]


def put(key: str, value: str) -> None:
    """Writes an entry that `entries` finds in all processes."""
    _client().key_value_set(f"{_SPACE}.{key}", value, allow_overwrite=True)


def entries(folder: str) -> dict[str, str]:
    """What the processes have `put` into a folder, by the rest of the key."""
    place = f"{_SPACE}.{folder}/"
    return {key.removeprefix(place): value for key, value in _client().key_value_dir_get(place)}


def forget(folder: str) -> None:
    """Takes a folder and all that was `put` there away."""
    if jax.process_count() > 1:
        _client().key_value_delete(f"{_SPACE}.{folder}/")


def _join(text: str | None, timeout: float) -> bool:
    """Whether there are other processes; if so they have met."""
    place = None if text is None else Place.parse(text)
    if place is None and "1" in (
        os.environ.get("SLURM_NTASKS"),
        os.environ.get("OMPI_COMM_WORLD_SIZE"),
    ):
        return False  # jax would restrict a lonely task to one GPU
    if place is not None and place.process == 0:
        _check_port(int(place.coordinator.rsplit(":", 1)[1]))
    # jax's own preemption service wants SIGTERM for itself; see Watch.agree_to_stop.
    jax.config.update("jax_enable_preemption_service", False)
    who = f"process {place.process} of {place.processes}" if place else "this process"
    where = f" at {place.coordinator}" if place else ""
    # jax's own timeout ends the process with a stack trace, so ours comes first.
    alarm = threading.Timer(
        timeout,
        _leave,
        (
            1,
            f"error: {who} waited {timeout:.0f} s for the others{where} and not all came; are "
            "all started, with the same address, and is its port open between the machines? "
            "--distributed_timeout waits longer",
        ),
    )
    alarm.daemon = True
    alarm.start()
    later = int(timeout) + 60
    try:
        if place is None:
            jax.distributed.initialize(initialization_timeout=later)
        else:
            jax.distributed.initialize(*place, initialization_timeout=later)
    except ValueError as error:
        if place is None and "coordinator_address should be defined" in str(error):
            return False  # nothing here says that there are others
        raise
    finally:
        alarm.cancel()
    return _numbers()[1] > 1


def _check_port(port: int) -> None:
    """Finds a port taken before jax does, which crashes on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(
                f"--distributed: port {port} of this machine cannot be opened "
                f"({error.strerror}); choose another for all processes"
            ) from error


def _fail(
    error: BaseException,
    watch: Watch,
    explain: Callable[[BaseException], int],
    name: str,
    again: str,
) -> NoReturn:
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Most likely a collective lost one of its processes. The watch soon knows which and
        # ends this process itself.
        watch.suspect(_GRACE)
        time.sleep(2 * _GRACE)
        lines = str(error).strip().splitlines()
        reason = f"a collective failed, most likely because another process is gone: {lines[0]}"
        status = 1
        sys.stderr.write(f"error: {name} stops: {reason}; {again}\n")
    else:
        status = explain(error)
        reason = " ".join(str(error).split()) or type(error).__name__
    watch.fail(reason)
    _last(watch)
    _leave(status)


def _lost(line: str) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    if _numbers()[0] == 0:
        time.sleep(_GRACE)  # the others have yet to find out, through this process
    _leave(1)


def _last(watch: Watch) -> None:
    """Lets process 0 go last: the others reach each other through it."""
    process, processes = _numbers()
    began = time.monotonic()
    while process == 0 and time.monotonic() - began < 2 * _GRACE:
        if len(watch.left() | {0}) == processes:
            break
        time.sleep(0.2)


def _leave(status: int, line: str = "") -> NoReturn:
    """Ends the process at once: any other way waits for processes that may be gone."""
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n" if line else "")
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _last_words(text: str) -> Iterator[None]:
    """What to say, and exit with status 1, where the runtime aborts.

    It does so at once, from a thread of its own, when process 0 is gone. Python's own signal
    handlers would run in the main thread, after the abort, that is never.
    """

    def say(_: int) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    libc = ctypes.CDLL(None)
    libc.signal(ctypes.c_int(signal.SIGABRT), handler)
    try:
        yield
    finally:
        libc.signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(None))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class _CoordinationService:
    """The key-value store of jax's coordination service."""

    def put(self, key: str, value: str) -> None:
        _client().key_value_set(f"{_SPACE}/{key}", value, allow_overwrite=True)

    def entries(self) -> dict[str, str]:
        found = _client().key_value_dir_get(f"{_SPACE}/")
        return {key.removeprefix(f"{_SPACE}/"): value for key, value in found}


def _client() -> Any:
    # jax offers the store to nobody by a public name; Orbax takes it from the same place.
    from jax._src import distributed

    return distributed.global_state.client


def _numbers() -> tuple[int, int]:
    """This process and how many there are, without starting jax's backends."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes


def _milliseconds(seconds: float) -> int:
    return int(1000 * seconds)
