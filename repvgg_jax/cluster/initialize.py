"""A process becomes one of many, and leaves them: nobody waits for one that is gone."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from repvgg_jax.cluster import consensus as distributed
from repvgg_jax.cluster import kv_store as coordination
from repvgg_jax.cluster.process_info import Place, launched_place
from repvgg_jax.cluster.watchdog import PATIENCE, Watch

_GRACE = 5.0  # seconds in which processes that stop tell each other why


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
      place: HOST:PORT,PROCESSES,PROCESS; None takes what the launcher says (`place.py`), a TPU
        pod or Kubernetes, and where nothing does there is one process.
      timeout: seconds to wait for all processes.
      explain: prints an error, returns the exit status.
      patience: seconds without a sign of life after which a process counts as lost.

    Raises:
      ValueError: `place` is malformed, or there are other processes and nothing says where.
      OSError: the port is taken.
    """
    if not _join(place, timeout):
        yield
        return
    process, processes = coordination.numbers()
    name = f"process {process} of {processes}"
    again = f"start all {processes} again and they continue from the last checkpoint"
    watch = Watch(
        coordination.Table(),
        process=process,
        processes=processes,
        patience=patience,
        on_loss=lambda what: _lost(f"error: {name} stops, because {what}; {again}"),
    )
    watch.start()
    last_words = f"error: {name} stops: it has lost the others, see above; {again}\n"
    with distributed.watched_by(watch), _last_words(last_words):
        try:
            yield
        except BaseException as error:
            _fail(error, watch, explain, name, again)
        watch.close()
        jax.distributed.shutdown()


def _join(text: str | None, timeout: float) -> bool:
    """Whether there are other processes; if so they have met."""
    place = launched_place(os.environ) if text is None else Place.parse(text)
    if place is not None and place.processes == 1:
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
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                local_device_ids=place.device,
                initialization_timeout=later,
            )
    except ValueError as error:
        if place is None and "coordinator_address should be defined" in str(error):
            return False  # nothing here says that there are others
        raise ValueError(
            f"jax cannot join other processes: {error} --distributed=HOST:PORT,PROCESSES,PROCESS "
            "says where they are"
        ) from error
    finally:
        alarm.cancel()
    return coordination.numbers()[1] > 1


def _check_port(port: int) -> None:
    """Finds a port taken before jax does, which crashes on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(
                f"--distributed: port {port} of this machine cannot be opened "
                f"({error.strerror}); choose another for all processes, there or by "
                "JAX_COORDINATOR_PORT"
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
    if coordination.numbers()[0] == 0:
        time.sleep(_GRACE)  # the others have yet to find out, through this process
    _leave(1)


def _last(watch: Watch) -> None:
    """Lets process 0 go last: the others reach each other through it."""
    process, processes = coordination.numbers()
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
