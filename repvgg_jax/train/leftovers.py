"""What Orbax leaves behind when it fails: work on other arrays that nobody waits for.

It runs on, and each piece of it prints a traceback when it ends, some hundred lines around the one
line that says what happened.
"""

import inspect
import logging
import sys
from typing import Any

_LOOP_IS_GONE = "Event loop is closed"


def hush() -> None:
    """Lets what is left behind from now on end without a word; other errors are heard."""
    if not isinstance(sys.unraisablehook, _Hush):
        sys.unraisablehook = _Hush(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(_is_news)  # twice adds it once


def _is_news(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


class _Hush:
    """A hook for errors that nobody can catch, without those of what was left behind."""

    def __init__(self, hook: Any):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error, source = unraisable.exc_value, unraisable.object
        ours = inspect.iscoroutine(source) and "orbax" in source.cr_code.co_filename
        if not ours and not (isinstance(error, RuntimeError) and str(error) == _LOOP_IS_GONE):
            self._hook(unraisable)
