"""What the processes of a run compare and agree on.

Each process drives its own devices, and all run the same program. In a single-process run
everything here returns at once. `initialize.py` makes a process part of a run. What may take hours
goes through the key-value store of jax's coordination service, not through a collective.
"""

import collections
import itertools
import json
import logging
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# jax has no public name for the client of its coordination service; Orbax uses this one, too.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from repvgg_jax.text import differences, versions

_log = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
_PREFIX = "repvgg_jax"  # of all keys and barriers of this package
DAY = 86400.0  # seconds; for what may take arbitrarily long


class Folder:
    """A folder of the key-value store of jax's coordination service, shared by all processes.

    Keys and values are strings.
    """

    def __init__(self, name: str):
        self._prefix = f"{_PREFIX}.{name}/"

    def put(self, key: str, value: str) -> None:
        """Writes an entry; replaces it if it exists."""
        client().key_value_set(self._prefix + key, value, allow_overwrite=True)

    def wait_for(self, key: str, *, timeout: float = DAY) -> str:
        """Returns a value as soon as a process has written it; `timeout` is in seconds."""
        return client().blocking_key_value_get(self._prefix + key, int(1000 * timeout))

    def entries(self) -> dict[str, str]:
        """All entries."""
        found = client().key_value_dir_get(self._prefix)
        return {key.removeprefix(self._prefix): value for key, value in found}

    def delete(self) -> None:
        """Deletes all entries."""
        client().key_value_delete(self._prefix)


def wait_at_barrier(name: str) -> None:
    """Waits until all processes have called this with the same name; use a name once per run."""
    client().wait_at_barrier(f"{_PREFIX}.{name}", int(1000 * DAY))


def client() -> Any:
    """The connection to the service; None in a single-process run."""
    return global_state.client


def process_id() -> int:
    """Like `jax.process_index()`, but does not initialize jax's backends."""
    return global_state.process_id


def num_processes() -> int:
    """Like `jax.process_count()`, but does not initialize jax's backends."""
    return global_state.num_processes


def on_one_machine() -> bool:
    """Whether the address of process 0 is one that only processes of its machine can reach."""
    host = (global_state.coordinator_address or "").rpartition(":")[0].strip("[]")
    return host == "localhost" or host.startswith("127.") or host == "::1"


def require_same(settings: Mapping[str, Any]) -> None:
    """Checks that all processes were started with the same settings and versions.

    Args:
      settings: JSON values, by name.

    Raises:
      ValueError: in every process, with the first process that differs from process 0, and how.
    """
    if client() is None:
        return
    own = {
        "config": settings,
        "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
    }
    process, folder = process_id(), Folder("settings")
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


def barrier(name: str) -> None:
    """Waits for all processes, without a collective.

    Collectives time out, with gloo after 30 s, and processes that compile on busy machines finish
    further apart.

    Args:
      name: used once per run.
    """
    if client() is not None:  # the watchdog ends this process if another is lost
        wait_at_barrier(name)


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


def gather(name: str, text: str, *, timeout: float = DAY) -> list[str]:
    """The texts of all processes, by process; without a collective, so it may take hours.

    Args:
      name: used once per run.
      text: of this process.
      timeout: seconds.
    """
    if client() is None:
        return [text]
    folder, processes = Folder(name), range(num_processes())
    folder.put(str(process_id()), text)
    return [folder.wait_for(str(process), timeout=timeout) for process in processes]


# Keys of Orbax's barriers: while it writes, and when it is done, written or failed; it passes the
# latter once before it writes, so the second time counts.
_WHILE_WRITING = "async_"
_DONE = "set_value_start#2"

_FOLLOWS = " has failed"  # the end of a failure that only follows from another process's


class SaveBarrier:
    """Saves that all processes make together: all succeed, or all learn why not.

    All processes of a run make the same saves in the same order. Orbax's processes wait for each
    other while they write. If one fails it goes on alone, and the others would wait for it until
    a timeout of twenty minutes, several times.
    """

    _count = itertools.count()  # so that keys of two instances differ

    def __init__(self) -> None:
        self._name = f"saves{next(self._count)}"
        self._save, self._verdicts = 0, 0
        self._passed = collections.Counter[str]()

    def begin(self) -> None:
        """Begins the next save, or the next attempt of one."""
        self._save += 1
        self._passed.clear()
        if self._save > 2 and jax.process_count() > 1 and jax.process_index() == 0:
            # Delete keys of finished saves; they would accumulate in long runs.
            for kind in ("verdicts", "barriers"):
                self._folder(kind, self._save - 2).delete()

    def verdict(self, failure: str | None) -> str | None:
        """Waits for the outcome of the save so far in all processes.

        Args:
          failure: why this process failed; None if it did not.

        Returns:
          Which processes failed and why; None if none did.
        """
        if jax.process_count() == 1:
            return failure
        if failure is not None:
            self._put("failed", failure)
        self._verdicts += 1
        name = f"{self._name}/verdicts/{self._save}/{self._verdicts}"
        answers = gather(name, failure or "")
        failed = [f"process {process}: {text}" for process, text in enumerate(answers) if text]
        causes = [line for line in failed if not line.endswith(_FOLLOWS)]
        return "; ".join(causes or failed) or None

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes, or until one cannot come any more; called by Orbax.

        Args:
          key: of the barrier.
          timeout_ms: milliseconds.

        Raises:
          OSError: a process has failed.
          TimeoutError: a process did not come in time.
        """
        count = jax.process_count()
        if count == 1:
            return
        self._passed[key] += 1
        barrier = f"{key}#{self._passed[key]}"
        deadline = time.monotonic() + timeout_ms / 1000
        self._put(barrier, "here")
        while True:
            found = self._folder("barriers", self._save).entries()
            missing = [i for i in range(count) if f"{i}/{barrier}" not in found]
            if not missing:
                return
            for process in missing:
                done = any(
                    name.startswith(f"{process}/") and name.endswith(_DONE) for name in found
                )
                if f"{process}/failed" in found or (_WHILE_WRITING in key and done):
                    raise OSError(f"process {process}{_FOLLOWS}")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {missing[0]} took more than {timeout_ms // 1000} s to write its part"
                )
            time.sleep(max(0.05, count / 128))

    def _put(self, key: str, text: str) -> None:
        self._folder("barriers", self._save).put(f"{jax.process_index()}/{key}", text)

    def _folder(self, kind: str, save: int) -> Folder:
        return Folder(f"{self._name}/{kind}/{save}")
