"""How many processes a run has and which one this is, as given by the user or by a launcher."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import NamedTuple

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
    """Reads a launcher's environment variables, unless jax can do so by itself.

    The innermost launcher counts: Open MPI and MPICH are often started within a SLURM job, whose
    own variables then count something else.

    Args:
      environment: of the process.

    Returns:
      Of a run of one process if this is the only one; None if jax detects the launcher, or if
      there is none.

    Raises:
      ValueError: there are other processes, and nothing says where process 0 is.
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
            f"{launcher.name} says that this is process {rank} of {size} ({launcher.size}={size}), "
            f"but not where process 0 is; give --distributed=HOST:PORT,{size},{rank}, or set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT for all"
        )
    return ProcessInfo.parse(f"{address},{size},{rank}")._replace(local_device_id=device)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        return None
