"""What the processes of a run compare and agree on.

Each process drives its own devices, and all run the same program. In a single-process run
everything here returns at once. `initialize.py` makes a process part of a run.
"""

import collections
import contextlib
import json
import logging
import platform
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from repvgg_jax.cluster import kv_store
from repvgg_jax.cluster.watchdog import Watchdog
from repvgg_jax.text import differences, versions

_log = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

_watchdog: Watchdog | None = None  # of this process; None in a single-process run


@contextlib.contextmanager
def watched_by(watchdog: Watchdog) -> Iterator[None]:
    """A context in which this process is one of several."""
    global _watchdog
    _watchdog = watchdog
    try:
        yield
    finally:
        _watchdog = None


def require_same(settings: Mapping[str, Any]) -> None:
    """Checks that all processes were started with the same settings and versions.

    Args:
      settings: JSON values, by name.

    Raises:
      ValueError: in every process, with the first process that differs from process 0, and how.
    """
    if _watchdog is None:
        return
    own = {
        "config": settings,
        "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
    }
    process, folder = kv_store.process_id(), kv_store.Folder("settings")
    folder.put(str(process), json.dumps(own))
    # Each process compares itself with process 0, and all wait for all results.
    first = json.loads(folder.wait_for("0", timeout=60))
    changed = [line.removeprefix(".") for line in differences(first, own, path="")]
    results = gather("differences", "; ".join(changed), timeout=60)
    for other, result in enumerate(results):
        if result:
            raise ValueError(
                f"process {other} was started differently from process 0: {result}; "
                "start all with the same command on the same versions"
            )


def announce(*, batch_size: int, details: str = "") -> None:
    """Logs this process's share of the devices and the batch; see `describe_share`."""
    if jax.process_count() > 1:
        share = describe_share(batch_size=batch_size, details=details)
        _log.info("%s", share, extra={"all_processes": True})


def describe_share(*, batch_size: int, details: str = "") -> str:
    """This process's share of the devices and the batch, on one line.

    Args:
      batch_size: of all devices together.
      details: appended.

    Raises:
      ValueError: the processes have different numbers of devices.
    """
    processes, devices = jax.process_count(), jax.device_count()
    shares = collections.Counter(device.process_index for device in jax.devices())
    if len(set(shares.values())) > 1:
        counts = ", ".join(f"process {process}: {shares[process]}" for process in sorted(shares))
        raise ValueError(f"every process needs the same number of devices; {counts}")
    return (
        f"{jax.local_device_count()} of {devices} devices, {processes} processes; "
        f"global batch {batch_size} = {batch_size // processes} per process = "
        f"{batch_size // devices} per device{details and f'; {details}'}"
    )


def agree_to_stop(received: signal.Signals | None) -> signal.Signals | None:
    """The signal to stop for, the same in all processes; see `Watchdog.agree_to_stop`."""
    return received if _watchdog is None else _watchdog.agree_to_stop(received)


def barrier(name: str) -> None:
    """Waits for all processes, without a collective.

    Collectives time out, with gloo after 30 s, and processes that compile on busy machines finish
    further apart.

    Args:
      name: used once per run.
    """
    if _watchdog is not None:  # which ends this process if another is lost
        kv_store.wait_at_barrier(name)


def broadcast(answer: bool) -> bool:
    """Process 0's answer, in all processes."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def all_true(answer: bool) -> bool:
    """Whether the answer is True in all processes."""
    if jax.process_count() == 1:
        return answer
    return bool(np.all(multihost_utils.process_allgather(np.asarray(answer))))


def gather(name: str, text: str, *, timeout: float = kv_store.DAY) -> list[str]:
    """The texts of all processes, by process; without a collective, so it may take hours.

    Args:
      name: used once per run.
      text: of this process.
      timeout: seconds.
    """
    if kv_store.client() is None:
        return [text]
    folder, processes = kv_store.Folder(name), range(kv_store.num_processes())
    folder.put(str(kv_store.process_id()), text)
    return [folder.wait_for(str(process), timeout=timeout) for process in processes]
