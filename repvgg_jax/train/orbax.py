"""What Orbax does differently for this package: how it saves, what it keeps and prints."""

import asyncio
import inspect
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from repvgg_jax import files

_SLICE = 2**22  # bytes, the least that a device saves of an array that others hold, too


class DurablePath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that is on disk before it gets its name; Orbax flushes arrays only.

    Older checkpoints are removed after that, so a power failure leaves one of them or the new one.
    """

    async def finalize(self) -> None:
        """Flushes the checkpoint, renames it, and flushes the name."""
        await asyncio.to_thread(files.sync, pathlib.Path(self.get()))
        await super().finalize()
        final = pathlib.Path(self.get_final())
        await asyncio.to_thread(files.sync, final)  # what was written last: time and success
        await asyncio.to_thread(files.sync_directory, final.parent)


class Best:
    """A preservation policy for Orbax that keeps the checkpoint that `best_of` chooses."""

    def __init__(self, best_of: Callable[[Sequence[int]], int | None]):
        self._best_of = best_of

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of these to keep."""
        best = self._best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


def handlers(options: ocp.options.MultiprocessingOptions) -> dict[str, Any]:
    """What saves and restores the items of a checkpoint.

    Devices that hold copies of an array share the work of saving it if it is large. By default
    they do for every array, for which each device compiles a slice of each shape.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return {
        "state": ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, multiprocessing_options=options
        ),
        "manifest": ocp.JsonCheckpointHandler(multiprocessing_options=options),
    }


def be_quiet() -> None:
    """Suppresses what Orbax reports about failures that are raised anyway.

    After a failed save Orbax abandons its work on other arrays. Each piece prints a traceback
    when it ends, some hundred lines around the one line with the cause.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_not_abandoned)  # adding it twice is harmless
    # Errors of abandoned coroutines are raised while they are garbage-collected, where only this
    # hook sees them.
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)


def _not_abandoned(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


class _UnraisableFilter:
    """A `sys.unraisablehook` that drops errors of Orbax's abandoned coroutines."""

    def __init__(self, hook: Any):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error, source = unraisable.exc_value, unraisable.object
        orbax = inspect.iscoroutine(source) and "orbax" in source.cr_code.co_filename
        if not orbax and not (
            isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        ):
            self._hook(unraisable)
