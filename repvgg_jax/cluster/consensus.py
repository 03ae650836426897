"""Many processes as one run: what they compare and agree on.

Each process drives its own devices and all run the same program. Everything here does nothing,
or the obvious, where there is one process. How a process joins the others: `joining.py`.
"""

import collections
import contextlib
import importlib.metadata
import json
import platform
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from repvgg_jax.cluster import kv_store as coordination
from repvgg_jax.cluster.watchdog import Watch
from repvgg_jax.text import differences

_VERSIONS = ("repvgg-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

_watch: Watch | None = None  # of this process, while it is one of many


@contextlib.contextmanager
def watched_by(watch: Watch) -> Iterator[None]:
    """This process is one of many while this context lasts."""
    global _watch
    _watch = watch
    try:
        yield
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
    client, (number, count) = coordination.client(), coordination.numbers()
    client.key_value_set(f"{coordination.SPACE}.settings/{number}", json.dumps(own))
    # All wait for process 0's and for the verdict of each on itself.
    first = json.loads(
        client.blocking_key_value_get(
            f"{coordination.SPACE}.settings/0", coordination.milliseconds(60)
        )
    )
    changed = [line.removeprefix(".") for line in differences(first, own, path="")]
    client.key_value_set(f"{coordination.SPACE}.verdict/{number}", "; ".join(changed))
    for other in range(count):
        verdict = client.blocking_key_value_get(
            f"{coordination.SPACE}.verdict/{other}", coordination.milliseconds(60)
        )
        if verdict:
            raise ValueError(
                f"process {other} was started differently from process 0: {verdict}; "
                "start all with the same command on the same versions"
            )


def announce(*, batch_size: int, group_size: int | None = None) -> None:
    """Prints what falls to this process, before it waits for another; see `describe_batch`."""
    if jax.process_count() > 1:
        print(describe_batch(batch_size=batch_size, group_size=group_size), flush=True)


def describe_batch(*, batch_size: int, group_size: int | None = None) -> str:
    """What falls to this process, in a line.

    Args:
      batch_size: images of all devices together.
      group_size: images that share batch statistics; None where none are taken.

    Raises:
      ValueError: the processes have different numbers of devices.
    """
    processes, devices = jax.process_count(), jax.device_count()
    shares = collections.Counter(device.process_index for device in jax.devices())
    if len(set(shares.values())) > 1:
        counts = ", ".join(f"process {process}: {shares[process]}" for process in sorted(shares))
        raise ValueError(f"every process needs as many devices as the others; {counts}")
    normalised = "" if group_size is None else f"; batch normalisation over {group_size}"
    return (
        f"process {jax.process_index()} of {processes}, {jax.local_device_count()} of {devices} "
        f"devices; global batch {batch_size} = {batch_size // processes} a process = "
        f"{batch_size // devices} a device{normalised}"
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
        coordination.client().wait_at_barrier(
            f"{coordination.SPACE}.{place}", coordination.milliseconds(86400)
        )


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
    count = jax.process_count()
    if count == 1:
        return [word]
    coordination.put(f"{question}/{jax.process_index()}", word)
    long = coordination.milliseconds(86400)
    keys = [f"{coordination.SPACE}.{question}/{process}" for process in range(count)]
    return [coordination.client().blocking_key_value_get(key, long) for key in keys]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
