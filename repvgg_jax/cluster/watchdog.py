"""Failure detection and coordinated stopping, without collectives.

A collective waits for all processes, so if one is gone the others hang in it. Each process
therefore has a thread that writes heartbeats to the key-value store of jax's coordination service
and reads those of the others, their failures, and requests to stop.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from repvgg_jax.cluster.consensus import Folder

TIMEOUT = 60.0  # seconds without a heartbeat after which a process counts as lost
INTERVAL = 0.5  # seconds between two heartbeats; more with many processes

_FINISHED = "done"


class Watchdog:
    """Watches the other processes of a run for one of them."""

    def __init__(
        self,
        store: Folder,
        *,
        process_id: int,
        num_processes: int,
        on_loss: Callable[[str], None],
        timeout: float = TIMEOUT,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares the watchdog; `start` starts its thread.

        Args:
          store: shared by the processes; its `put` and `entries` are used.
          process_id: of this process.
          num_processes: of the run.
          on_loss: called in the watchdog's thread with what happened to another process.
          timeout: seconds without a heartbeat after which a process counts as lost.
          interval: seconds between two heartbeats.
          clock: seconds, monotonic.
        """
        self._store, self._process_id, self._num_processes = store, process_id, num_processes
        self._on_loss, self._timeout, self._clock = on_loss, timeout, clock
        # The store is in process 0 and answers some hundred requests per second.
        self._interval = max(INTERVAL, num_processes / 128) if interval is None else interval
        self._beats = 0
        self._seen: dict[int, tuple[str | None, float]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        # State of coordinated stopping, guarded by the condition.
        self._changed = threading.Condition()
        self._polls = 0
        self._proposed = False
        self._stop_at: int | None = None
        self._reason: signal.Signals | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops the thread and marks this process as finished; the others stop expecting it."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._store.put(self._key("polls"), str(self._polls))
        self._store.put(self._key("beat"), _FINISHED)

    def fail(self, reason: str) -> None:
        """Publishes why this process stops, and ignores the others from now on."""
        self._on_loss = lambda what: None
        self._store.put(self._key("failure"), reason)

    def shorten_timeout(self, timeout: float) -> None:
        """Declares a process lost sooner, e.g. after a collective has failed."""
        self._timeout = min(self._timeout, timeout)

    def finished(self) -> set[int]:
        """The processes that have finished or failed."""
        entries = self._store.entries()
        return {
            other
            for other in range(self._num_processes)
            if entries.get(f"{other}/beat") == _FINISHED or f"{other}/failure" in entries
        }

    def agree_to_stop(self, received: signal.Signals | None) -> signal.Signals | None:
        """Whether to stop here; the same answer in all processes at the same call.

        Every process calls it at the same places of the program, e.g. once per step, though not
        at the same time: if a process is ahead when a signal arrives, it waits here until all
        have published their progress.

        Args:
          received: the signal that asked this process to stop, if any.

        Returns:
          The signal that asked one of them to stop, as soon as all know of it; else None.
        """
        with self._changed:
            self._polls += 1
            if received is not None and self._reason is None:
                self._reason = received
                self._store.put(self._key("stop"), received.name)
            self._changed.wait_for(lambda: not self._proposed or self._stop_at is not None)
            stop = self._stop_at is not None and self._polls >= self._stop_at
            return self._reason if stop else None

    def check(self) -> None:
        """Sends one heartbeat and reads the others'; the thread calls this repeatedly."""
        self._beats += 1
        self._store.put(self._key("beat"), str(self._beats))
        entries, now = self._store.entries(), self._clock()
        for other in range(self._num_processes):
            if other == self._process_id:
                continue
            who = f"process {other} of {self._num_processes}"
            if f"{other}/failure" in entries:
                return self._on_loss(f"{who} stopped: {entries[f'{other}/failure']}")
            beat = entries.get(f"{other}/beat")
            last, since = self._seen.get(other, (None, now))
            if other not in self._seen or beat != last:
                self._seen[other] = beat, now
            elif beat != _FINISHED and now - since > self._timeout:
                return self._on_loss(f"{who} is gone: no heartbeat for {self._timeout:.0f} s")
        self._agree_on_poll(entries)
        return None

    def _agree_on_poll(self, entries: Mapping[str, str]) -> None:
        """If a stop was requested: publishes this process's poll count, then takes the maximum."""
        requests = [entries.get(f"{other}/stop") for other in range(self._num_processes)]
        reason = next((signal.Signals[name] for name in requests if name), None)
        if reason is None or self._stop_at is not None:
            return
        with self._changed:
            self._reason = reason
            if not self._proposed:
                # From here until the decision, `agree_to_stop` blocks.
                self._proposed = True
                self._store.put(self._key("polls"), str(self._polls))
            found = [entries.get(f"{other}/polls") for other in range(self._num_processes)]
            polls = [int(count) for count in found if count is not None]
            if len(polls) == self._num_processes:
                self._stop_at = max(polls) + 1
                self._changed.notify_all()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self.check()
            except RuntimeError as error:  # of jax's client: process 0 holds the store
                if not self._closed.is_set():
                    reason = str(error).partition("\n")[0]
                    self._on_loss(f"process 0 of {self._num_processes} does not answer: {reason}")
                return

    def _key(self, name: str) -> str:
        return f"{self._process_id}/{name}"


_watchdog: Watchdog | None = None  # of this process; None in a single-process run


@contextlib.contextmanager
def watched_by(watchdog: Watchdog) -> Iterator[None]:
    """A context in which `agree_to_stop` asks this watchdog."""
    global _watchdog
    _watchdog = watchdog
    try:
        yield
    finally:
        _watchdog = None


def agree_to_stop(received: signal.Signals | None) -> signal.Signals | None:
    """The signal to stop for, the same in all processes; see `Watchdog.agree_to_stop`."""
    return received if _watchdog is None else _watchdog.agree_to_stop(received)
