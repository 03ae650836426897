"""Processes that read for this one: signals are not theirs to answer, and they end with it.

A terminal sends Ctrl-C to all processes that it runs, and a scheduler may send SIGTERM to all of a
job's. The run stops between two steps and saves; a worker that died of the same signal before
would leave it without the images of its last steps.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes and threads that are started here never receive `SIGNALS`.

    What is blocked stays so in every descendant, from its first instruction on; `begin` alone
    would come seconds later, when a worker has imported what it needs.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # It starts with the first worker otherwise, and unblocks the signals when it has.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(index: int, count: int) -> None:
    """The first thing that a worker does.

    Args:
      index: which worker it is; it makes no difference.
      count: of how many.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    # A worker asks its parent whether to stop; one that was killed never answers.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
