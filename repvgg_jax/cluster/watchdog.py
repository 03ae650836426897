"""Processes of one run that keep an eye on each other, beside the collectives they share.

A collective waits for everybody: where one process is gone the others would hang in it. A
thread of every process therefore says once in a while, in the key-value store of jax's
coordination service, that its process is alive, and reads what the others say there: that
they are alive, that they failed and why, that somebody asked them to stop.
"""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

PATIENCE = 60.0  # seconds without a sign of life after which a process counts as lost
INTERVAL = 0.5  # seconds between two looks; more where there are many processes

_DONE = "done"


class Store(Protocol):
    """A table of strings that all processes of a run share."""

    def put(self, key: str, value: str) -> None:
        """Writes an entry, or writes over it."""
        ...

    def entries(self) -> Mapping[str, str]:
        """All entries."""
        ...


class Watch:
    """One process's eye on the others."""

    def __init__(
        self,
        store: Store,
        *,
        process: int,
        processes: int,
        on_loss: Callable[[str], None],
        patience: float = PATIENCE,
        interval: float | None = None,
    ):
        """Prepares the watch; `start` begins it.

        Args:
          store: shared by the processes.
          process: the number of this one.
          processes: how many there are.
          on_loss: told, from the watching thread, what became of another process.
          patience: seconds without a sign of life after which a process counts as lost.
          interval: seconds between two looks.
        """
        self._store, self._process, self._processes = store, process, processes
        self._on_loss, self._patience = on_loss, patience
        # The store is one process's: it answers some hundred looks a second, whatever the pod.
        self._interval = max(INTERVAL, processes / 128) if interval is None else interval
        self._beats = 0
        self._seen: dict[int, tuple[str | None, float]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        # Of stopping together; guarded by the condition.
        self._changed = threading.Condition()
        self._polls = 0
        self._proposed = False
        self._stop_at: int | None = None
        self._reason: signal.Signals | None = None

    def start(self) -> None:
        """Begins to watch, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Says goodbye: from now on nobody misses this process."""
        self._closed.set()
        self._thread.join()
        self._store.put(self._key("polls"), str(self._polls))
        self._store.put(self._key("beat"), _DONE)

    def fail(self, reason: str) -> None:
        """Tells the others in a line why this process stops; what becomes of them is theirs."""
        self._on_loss = lambda what: None
        self._store.put(self._key("failure"), reason)

    def suspect(self, patience: float) -> None:
        """Counts a process as lost sooner: something happened that hints at it."""
        self._patience = min(self._patience, patience)

    def left(self) -> set[int]:
        """The processes that said goodbye or failed."""
        entries = self._store.entries()
        return {
            other
            for other in range(self._processes)
            if entries.get(f"{other}/beat") == _DONE or f"{other}/failure" in entries
        }

    def agree_to_stop(self, received: signal.Signals | None) -> signal.Signals | None:
        """Whether to stop here; the same answer in all processes at the same call.

        Every process calls it at the same places of the program, and they may be apart: who
        is ahead when a signal arrives waits here until all have said how far they are.

        Args:
          received: the signal that asked this process to stop, if one did.

        Returns:
          The signal that asked one of them to stop, as soon as all know of it.
        """
        with self._changed:
            self._polls += 1
            if received is not None and self._reason is None:
                self._reason = received
                self._store.put(self._key("stop"), received.name)
            self._changed.wait_for(lambda: not self._proposed or self._stop_at is not None)
            stop = self._stop_at is not None and self._polls >= self._stop_at
            return self._reason if stop else None

    def look(self) -> None:
        """One look at the others; the thread calls it again and again."""
        self._beats += 1
        self._store.put(self._key("beat"), str(self._beats))
        entries, now = self._store.entries(), time.monotonic()
        for other in range(self._processes):
            if other == self._process:
                continue
            if f"{other}/failure" in entries:
                return self._on_loss(
                    f"process {other} of {self._processes} stopped: {entries[f'{other}/failure']}"
                )
            beat = entries.get(f"{other}/beat")
            last, since = self._seen.get(other, (None, now))
            if other not in self._seen or beat != last:
                self._seen[other] = beat, now
            elif beat != _DONE and now - since > self._patience:
                return self._on_loss(
                    f"process {other} of {self._processes} is gone: "
                    f"no sign of life for {self._patience:.0f} s"
                )
        self._stop_together(entries)
        return None

    def _stop_together(self, entries: Mapping[str, str]) -> None:
        asked = [entries.get(f"{other}/stop") for other in range(self._processes)]
        reason = next((signal.Signals[name] for name in asked if name), None)
        if reason is None or self._stop_at is not None:
            return
        with self._changed:
            self._reason = reason
            if not self._proposed:
                # From here to the answer nobody passes a poll.
                self._proposed = True
                self._store.put(self._key("polls"), str(self._polls))
            found = [entries.get(f"{other}/polls") for other in range(self._processes)]
            passed = [int(polls) for polls in found if polls is not None]
            if len(passed) == self._processes:
                self._stop_at = max(passed) + 1
                self._changed.notify_all()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self.look()
            except RuntimeError as error:
                if not self._closed.is_set():
                    reason = str(error).partition("\n")[0]
                    self._on_loss(f"process 0 of {self._processes} does not answer: {reason}")
                return

    def _key(self, name: str) -> str:
        return f"{self._process}/{name}"
