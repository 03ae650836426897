"""A process joins a run of several, and leaves it without waiting for those that are gone.

The user or a launcher gives how many processes the run has and which one this is.
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax

# Which address gloo listens on is not a setting of jax's public interface.
from jax._src import xla_bridge
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jax.extend.backend import register_backend_factory

from repvgg_jax.cluster import consensus
from repvgg_jax.cluster.watchdog import TIMEOUT, Watchdog, watched_by

_GRACE = 5.0  # seconds in which processes that stop tell each other why


@contextlib.contextmanager
def initialized(
    distributed: str | None,
    *,
    timeout: float,
    explain: Callable[[BaseException], int],
    heartbeat_timeout: float = TIMEOUT,
) -> Iterator[None]:
    """A context in which this process is part of a run of several, if it was started as such.

    To be entered before jax initializes its backends. An exception inside is reported to the
    other processes and ends this one at once: the interpreter's own exit would wait for them.

    Args:
      distributed: HOST:PORT,PROCESSES,PROCESS. If None, a launcher, a TPU pod
        or Kubernetes provides it, and without any of them the run has one process.
      timeout: seconds to wait for all processes.
      explain: prints an exception, returns the exit status.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
      ValueError: `distributed` is malformed, or there are other processes at an unknown address.
      OSError: the port is taken.
    """
    if not _connect(distributed, timeout):
        yield
        return
    process, processes = consensus.process_id(), consensus.num_processes()
    name = f"process {process} of {processes}"
    again = f"start all {processes} again and they continue from the last checkpoint"
    watchdog = Watchdog(
        consensus.Folder("watchdog"),
        process_id=process,
        num_processes=processes,
        timeout=heartbeat_timeout,
        on_loss=lambda what: _stop_after_loss(f"error: {name} stops, because {what}; {again}"),
    )
    watchdog.start()
    abort_message = f"error: {name} stops: it has lost the others, see above; {again}\n"
    with watched_by(watchdog), _message_on_abort(abort_message):
        try:
            check_host_name()
            yield
        except BaseException as error:
            _fail(error, watchdog, explain, name, again)
        watchdog.close()
        jax.distributed.shutdown()


def _connect(text: str | None, timeout: float) -> bool:
    """Waits for the other processes; returns False if there are none."""
    info = from_launcher(os.environ) if text is None else ProcessInfo.parse(text)
    if info is not None and info.num_processes == 1:
        return False  # jax would restrict a single task of a launcher to one GPU
    if info is not None and info.process_id == 0:
        _check_port(int(info.coordinator_address.rsplit(":", 1)[1]))
    # jax's preemption service would take SIGTERM for itself; see Watchdog.agree_to_stop.
    jax.config.update("jax_enable_preemption_service", False)
    who = f"process {info.process_id} of {info.num_processes}" if info else "this process"
    where = f" at {info.coordinator_address}" if info else ""
    # jax's own timeout ends the process with a stack trace, so this one comes first.
    message = (
        f"error: {who} waited {timeout:.0f} s for the others{where} and not all came; are all "
        "started, with the same address, and is its port open between the machines? "
        "--distributed_timeout waits longer"
    )
    timer = threading.Timer(timeout, _exit, (1, message))
    timer.daemon = True
    timer.start()
    later = int(timeout) + 60
    try:
        if info is None:
            jax.distributed.initialize(initialization_timeout=later)
        else:
            jax.distributed.initialize(
                info.coordinator_address,
                info.num_processes,
                info.process_id,
                local_device_ids=info.local_device_id,
                initialization_timeout=later,
            )
    except ValueError as error:
        if info is None and "coordinator_address should be defined" in str(error):
            return False  # neither a launcher nor an environment that jax detects
        raise ValueError(
            f"jax cannot join other processes: {error}; give "
            "--distributed=HOST:PORT,PROCESSES,PROCESS"
        ) from error
    finally:
        timer.cancel()
    return consensus.num_processes() > 1


def _check_port(port: int) -> None:
    """Finds a taken port before jax does, which crashes on it."""
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


def check_host_name() -> None:
    """Finds a host without an address before gloo does, which fails on it with a traceback.

    Processes of one machine, as the address of process 0 shows, use the loopback address instead.

    Raises:
      OSError: there are processes on other machines.
    """
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms and "cpu" not in platforms.split(","):
        return
    try:
        socket.getaddrinfo(name := socket.gethostname(), None)
    except OSError as error:
        if consensus.on_one_machine():
            register_backend_factory("cpu", _cpu_client_on_loopback, priority=0)
            return
        raise OSError(
            f"this machine cannot resolve its own name {name!r} ({error.strerror}), which jax "
            "needs for processes on several machines; add it to /etc/hosts"
        ) from error


def _cpu_client_on_loopback() -> Any:
    """The backend for CPUs, with collectives that do not look up the name of the host."""
    collectives = _jax.make_gloo_tcp_collectives(
        distributed_client=consensus.client(), hostname="127.0.0.1"
    )
    return xla_bridge.make_cpu_client(collectives)


def _fail(
    error: BaseException,
    watchdog: Watchdog,
    explain: Callable[[BaseException], int],
    name: str,
    again: str,
) -> NoReturn:
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Most likely a collective lost one of its processes. The watchdog soon knows which, and
        # ends this process itself.
        watchdog.shorten_timeout(_GRACE)
        time.sleep(2 * _GRACE)
        lines = str(error).strip().splitlines()
        reason = f"a collective failed, most likely because another process is gone: {lines[0]}"
        status = 1
        sys.stderr.write(f"error: {name} stops: {reason}; {again}\n")
    else:
        status = explain(error)
        reason = " ".join(str(error).split()) or type(error).__name__
    watchdog.fail(reason)
    _wait_for_others(watchdog)
    _exit(status)


def _stop_after_loss(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    if consensus.process_id() == 0:
        time.sleep(_GRACE)  # the others learn of it through this process
    _exit(1)


def _wait_for_others(watchdog: Watchdog) -> None:
    """Makes process 0 the last one to exit: it holds the store."""
    began = time.monotonic()
    while consensus.process_id() == 0 and time.monotonic() - began < 2 * _GRACE:
        if len(watchdog.finished() | {0}) == consensus.num_processes():
            break
        time.sleep(0.2)


def _exit(status: int, message: str = "") -> NoReturn:
    """Ends the process at once: any other exit waits for processes that may be gone."""
    sys.stdout.flush()
    sys.stderr.write(f"{message}\n" if message else "")
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _message_on_abort(text: str) -> Iterator[None]:
    """Prints a message and exits with status 1 if jax's runtime aborts the process.

    It aborts from a thread of its own as soon as process 0 is gone. This needs a handler in C:
    Python runs its signal handlers in the main thread, after the abort, i.e. never.
    """

    def handle(_: int) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        os._exit(1)  # nothing else is safe in a signal handler

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    libc = ctypes.CDLL(None)
    libc.signal(ctypes.c_int(signal.SIGABRT), handler)
    try:
        yield
    finally:
        libc.signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(None))


_PORTS = range(61440, 65536)  # jax derives ports from job ids in the same range


class ProcessInfo(NamedTuple):
    """The arguments of `jax.distributed.initialize`.

    Attributes:
      coordinator_address: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: of this process, from 0.
      local_device_id: of the one device of its machine that it drives; None for all, or for those
        that jax chooses.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_id: int | None = None

    @classmethod
    def parse(cls, text: str) -> "ProcessInfo":
        """Parses HOST:PORT,PROCESSES,PROCESS.

        Raises:
          ValueError: it does not have this form.
        """
        try:
            address, count, number = text.split(",")
            host, port = address.rsplit(":", 1)
            info = cls(address, int(count), int(number))
            valid = host and 0 < int(port) < 65536 and 0 <= info.process_id < info.num_processes
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f"--distributed={text} is not HOST:PORT,PROCESSES,PROCESS with PROCESS from 0 to "
                "PROCESSES-1; e.g. for the second of four: --distributed=10.0.0.1:1234,4,1"
            )
        return info


@dataclasses.dataclass(frozen=True)
class _Launcher:
    """The environment variables with which a launcher describes a process."""

    name: str
    size: str
    rank: str
    local_size: str
    local_rank: str
    job: str = ""  # the same in all processes of a job, different in the next job


_OPEN_MPI = _Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMIX_NAMESPACE",
)
# Launchers that jax does not detect; Open MPI it detects by a variable that version 5 lacks.
_LAUNCHERS = (
    _OPEN_MPI,
    _Launcher(
        "MVAPICH",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
    ),
    _Launcher("MPICH", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    _Launcher(
        "torchrun", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"
    ),
)
_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"
_SINGLE = ProcessInfo("", 1, 0)
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def from_launcher(environment: Mapping[str, str]) -> ProcessInfo | None:
    """Reads a launcher's environment variables, unless jax reads them itself.

    The innermost launcher counts: Open MPI and MPICH are often started within a SLURM job, whose
    own variables then count something else.

    Args:
      environment: of the process.

    Returns:
      `ProcessInfo` of this process, with `num_processes=1` for a single one; None if jax detects
      the launcher, or if there is none.

    Raises:
      ValueError: there are other processes, and the address of process 0 is unknown.
    """
    by_srun = all(name in environment for name in _SLURM)
    for launcher in _LAUNCHERS:
        size, rank = (_number(environment, name) for name in (launcher.size, launcher.rank))
        if size is None or rank is None:
            continue
        if size == 1 and launcher is _OPEN_MPI:
            return _SINGLE
        if launcher is _OPEN_MPI and _OPEN_MPI_4 in environment:
            return None
        if launcher is not _OPEN_MPI and by_srun and environment["SLURM_NTASKS"] == str(size):
            return None  # srun also sets the variables of PMI
        if size > 1:
            return _from_variables(launcher, environment, size, rank)
    size, rank = (_number(environment, name) for name in ("SLURM_NTASKS", "SLURM_PROCID"))
    if size == 1:
        return _SINGLE
    if size is not None and rank is not None and not by_srun:
        raise ValueError(
            f"SLURM has {size} processes (SLURM_NTASKS={size}), but srun did not start this one; "
            f"start it by srun, or give --distributed=HOST:PORT,{size},{rank}; for a run of one "
            "process give --distributed=localhost:1234,1,0"
        )
    return None


def _from_variables(
    launcher: _Launcher, environment: Mapping[str, str], size: int, rank: int
) -> ProcessInfo:
    device = _number(environment, launcher.local_rank)
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        device = None  # jax reads it itself
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and _number(environment, launcher.local_size) == size:
        job = environment.get(launcher.job, "").encode()  # all are on this machine
        port = environment.get("JAX_COORDINATOR_PORT") or _PORTS[zlib.crc32(job) % len(_PORTS)]
        address = f"127.0.0.1:{port}"
    if address is None:
        raise ValueError(
            f"{launcher.name} started this process as {rank} of {size} ({launcher.size}={size}), "
            f"but the address of process 0 is unknown; give --distributed=HOST:PORT,{size},{rank}, "
            "or set JAX_COORDINATOR_ADDRESS=HOST:PORT for all"
        )
    return ProcessInfo.parse(f"{address},{size},{rank}")._replace(local_device_id=device)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        return None
