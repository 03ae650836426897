"""A process's place among others: given by the user, or by the launcher that started it."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import NamedTuple

_PORTS = range(61440, 65536)  # where jax, too, looks for one that jobs hardly share


class Place(NamedTuple):
    """This process's place among others.

    Attributes:
      coordinator: HOST:PORT where process 0 is waited for.
      processes: how many there are.
      process: which one this is, from 0.
      device: the one of its machine that it drives; None for all, or for what jax finds.
    """

    coordinator: str
    processes: int
    process: int
    device: int | None = None

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


@dataclasses.dataclass(frozen=True)
class _Launcher:
    """The variables by which a launcher tells a process of its place."""

    name: str
    size: str
    rank: str
    local_size: str
    local_rank: str
    job: str = ""  # the same in all processes of a job, another in the next job


_OPEN_MPI = _Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMIX_NAMESPACE",
)
# Those that jax does not know; Open MPI it knows by a variable that ended with version 4.
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
_ALONE = Place("", 1, 0)
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def launched_place(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher's variables give, where jax would not find it by itself.

    The innermost launcher counts: Open MPI's and MPICH's are often started inside a job of
    SLURM's, whose own variables then count something else.

    Args:
      environment: of the process.

    Returns:
      A place among one where this process is the only one; None where jax knows better, or
      where nothing says that there are others.

    Raises:
      ValueError: there are others, and nothing says where process 0 is.
    """
    by_srun = all(name in environment for name in _SLURM)
    for launcher in _LAUNCHERS:
        size, rank = (_number(environment, name) for name in (launcher.size, launcher.rank))
        if size is None or rank is None:
            continue
        if size == 1 and launcher is _OPEN_MPI:
            return _ALONE
        if launcher is _OPEN_MPI and _OPEN_MPI_4 in environment:
            return None
        if launcher is not _OPEN_MPI and by_srun and environment["SLURM_NTASKS"] == str(size):
            return None  # srun speaks PMI beside its own variables
        if size > 1:
            return _place(launcher, environment, size, rank)
    size, rank = (_number(environment, name) for name in ("SLURM_NTASKS", "SLURM_PROCID"))
    if size == 1:
        return _ALONE
    if size is not None and rank is not None and not by_srun:
        raise ValueError(
            f"SLURM speaks of {size} processes (SLURM_NTASKS={size}), but srun did not start this "
            f"one; start it by srun, or say --distributed=HOST:PORT,{size},{rank}; for one process "
            "alone --distributed=localhost:1234,1,0"
        )
    return None


def _place(launcher: _Launcher, environment: Mapping[str, str], size: int, rank: int) -> Place:
    device = _number(environment, launcher.local_rank)
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        device = None  # jax reads it itself
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and _number(environment, launcher.local_size) == size:
        job = environment.get(launcher.job, "").encode()  # all on this machine
        port = environment.get("JAX_COORDINATOR_PORT") or _PORTS[zlib.crc32(job) % len(_PORTS)]
        address = f"127.0.0.1:{port}"
    if address is None:
        raise ValueError(
            f"{launcher.name} says that this is process {rank} of {size} ({launcher.size}={size}), "
            f"but not where process 0 is; say --distributed=HOST:PORT,{size},{rank}, or set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT for all"
        )
    return Place.parse(f"{address},{size},{rank}")._replace(device=device)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        return None
