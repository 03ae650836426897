"""How far a long computation has come: a bar on a terminal, a line every ten seconds elsewhere.

Nothing is shown unless the logger of this package lets INFO through, as the commands set it without
`--quiet`; a library's caller sees nothing.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two lines where there is no terminal."""

Advance = Callable[..., None]
"""`advance(count, what)`: so many more are done, and `what`, if given, is at work now."""


def silent(count: int = 1, what: str = "") -> None:
    """Shows nothing."""


@contextlib.contextmanager
def progress(title: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """A context in which progress is shown: a bar on standard error, lines in the log.

    Args:
      title: what is done, e.g. `evaluating`.
      total: number of all.
      unit: what is counted.

    Yields:
      A function to call as things get done.
    """
    if not logger.isEnabledFor(logging.INFO):
        yield silent
        return
    console = rich.console.Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(title, total, unit)
        return
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        unit,
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, what="")

        def advance(count: int = 1, what: str = "") -> None:
            bar.update(task, advance=count)
            if what:
                bar.update(task, what=what)

        yield advance


@contextlib.contextmanager
def announced(message: str, *args: Any) -> Iterator[None]:
    """A context that logs a message, like `logger.info`, if it takes more than `EVERY` seconds."""
    note = threading.Timer(EVERY, logger.info, (message, *args))
    note.daemon = True
    note.start()
    try:
        yield
    finally:
        note.cancel()


class _Lines:
    """Writes a line from time to time."""

    def __init__(self, title: str, total: int, unit: str):
        self._title, self._total, self._unit = title, total, unit
        self._done, self._written = 0, time.monotonic()

    def __call__(self, count: int = 1, what: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._written >= EVERY and self._done < self._total:
            self._written = now
            logger.info(
                "%s: %s of %s %s%s",
                self._title,
                f"{self._done:,}",
                f"{self._total:,}",
                self._unit,
                f", now {what}" if what else "",
            )
