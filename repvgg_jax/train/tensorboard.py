"""Scalars in a file for TensorBoard, written where they arise.

tensorboardX has a writer with a thread and a queue. If the system's clock jumps, that thread ends
with an error, the queue fills, and training waits for it forever; only its file format is used.
"""

import pathlib
import sys
import time
import uuid
from collections.abc import Mapping

if _hides_torch := "torch" not in sys.modules:
    # tensorboardX imports PyTorch where it is installed, for tensors that are not used here. That
    # takes longer than all other imports of a training run.
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if _hides_torch:
        del sys.modules["torch"]

PATIENCE = 10.0  # seconds between two flushes, at least


class EventFile:
    """A file of scalars in a directory for TensorBoard; one per start of a run."""

    def __init__(self, directory: pathlib.Path, *, purge_step: int | None = None):
        """Opens the file.

        Args:
          directory: where; created if it is missing.
          purge_step: what older files in it have from this step on is not shown any more.
        """
        directory.mkdir(parents=True, exist_ok=True)
        # The name has the time in it, which may be that of an older file.
        suffix = f".{uuid.uuid4().hex[:8]}"
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=suffix)
        self._flushed = time.monotonic()
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds scalars of one step; they are on disk after `PATIENCE` or when it is closed."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > PATIENCE:
            self._writer.flush()
            self._flushed = time.monotonic()
