"""What a loop calls between two steps: to stop on SIGTERM or Ctrl-C, and to trace a few steps."""

import logging
import pathlib
import signal
import types
from collections.abc import Callable
from typing import Any, Self

import jax

logger = logging.getLogger(__name__)

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


class Profile:
    """Traces the steps of a range, for TensorBoard or Perfetto.

    A context manager that ends a trace that is still open.
    """

    def __init__(self, path: pathlib.Path, steps: range):
        """Prepares a trace.

        Args:
          path: the directory that it is written to.
          steps: the steps to trace; may be empty.
        """
        self._path, self._steps = path, steps
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace if `step` is the first of the range; call it before every step."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._path)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if `step` is the last of the range; call it after every step."""
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._steps = False, range(0)
        logger.info("trace: %s", self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._running:
            self._stop()


def parse_steps(text: str) -> range:
    """`10:20` as the steps 10 to 19; an empty text as none.

    Raises:
      ValueError: anything else.
    """
    if not text:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
        raise ValueError(
            f"--profile_steps={text} is not FIRST:END with 0 < FIRST < END; 10:20 traces 10 to 19"
        )
    return range(int(first), int(end))
