"""A trace of a few steps, for TensorBoard or Perfetto."""

import logging
import pathlib
import types
from typing import Any, Self

import jax

logger = logging.getLogger(__name__)


class Profile:
    """Traces the steps of a range; a context manager that ends a trace that is still open."""

    def __init__(self, path: pathlib.Path, steps: range):
        """Prepares a trace.

        Args:
          path: the directory that it is written to.
          steps: the steps to trace; may be empty.
        """
        self._path, self._steps = path, steps
        self._running = False

    def before(self, step: int) -> None:
        """To be called before every step."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._path)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """To be called after every step with its result."""
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
