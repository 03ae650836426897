"""What Orbax leaves behind when it fails: work on other arrays that nobody waits for.

It runs on, and each piece of it prints a traceback when it ends, some hundred lines around the one
line that says what happened.
"""

import gc
import inspect
import logging
import sys
from typing import Any

_LOOP_IS_GONE = "Event loop is closed"


def hush() -> None:
    """Lets what is left behind from now on end without a word; errors of others are heard."""
    logger = logging.getLogger("asyncio")
    before, logger.disabled = logger.disabled, True  # "exception was never retrieved", a task each
    if not isinstance(sys.unraisablehook, _Hush):
        sys.unraisablehook = _Hush(sys.unraisablehook)
    gc.collect()
    logger.disabled = before


class _Hush:
    """A hook for errors that nobody can catch, without those of what was left behind."""

    def __init__(self, hook: Any):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error, source = unraisable.exc_value, unraisable.object
        ours = inspect.iscoroutine(source) and "orbax" in source.cr_code.co_filename
        if not ours and not (isinstance(error, RuntimeError) and str(error) == _LOOP_IS_GONE):
            self._hook(unraisable)
