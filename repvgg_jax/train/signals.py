"""SIGTERM and Ctrl-C stop a run between two steps."""

import signal
import types
from collections.abc import Callable
from typing import Any, Self

Signal = signal.Signals | None


class StopRequest:
    """A context manager that records SIGTERM and SIGINT, which the loop polls between two steps.

    A second Ctrl-C raises KeyboardInterrupt at once.

    Attributes:
      signal: that the run stops for, as soon as `poll` has returned True; else None.
    """

    def __init__(self, agree: Callable[[Signal], Signal] = lambda received: received):
        """Prepares the context.

        Args:
          agree: maps the signal that this process has received, if any, to the one that all
            processes of the run stop for.
        """
        self.signal: Signal = None
        self._received: Signal = None
        self._agree = agree
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def poll(self) -> bool:
        """Whether to stop here; all processes of a run call this at the same places."""
        if self.signal is None:
            self.signal = self._agree(self._received)
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not in the main thread: the caller handles its own signals
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: types.FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
