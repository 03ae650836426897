"""Copies of a directory at every instant at which a process might be killed.

Before every call of Python that changes something in the directory, the directory is copied.
A file that was opened for writing is then also cut in the middle of what was written.
"""

import contextlib
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

_CHANGES = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.link": (0, 1),
    "os.truncate": (0,),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Instants:
    """Copies of `source` in numbered directories of `target`.

    Attributes:
      copies: the directories.
      reasons: what was about to happen when each was made.
    """

    def __init__(self, source: pathlib.Path, target: pathlib.Path):
        self._source, self._target = source, target
        self._lock, self._busy = threading.RLock(), False
        self._opened: dict[pathlib.Path, int] = {}
        self._last: dict[pathlib.Path, bytes | None] = {}
        self.copies: list[pathlib.Path] = []
        self.reasons: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        """An audit hook; see `sys.addaudithook`."""
        path = self._changed(event, arguments)
        if path is None:
            return
        with self._lock:
            if self._busy:
                return
            self._busy = True
            try:
                reason = f"{event} {path.relative_to(self._source.parent)}"
                self._copy(reason)
                for file, before in self._opened.items():
                    self._cut(file, before, reason)
                self._opened.clear()
                if event == "open":
                    appends = "a" in str(arguments[1]) and path.exists()
                    self._opened[path] = path.stat().st_size if appends else 0
            finally:
                self._busy = False

    def _changed(self, event: str, arguments: tuple) -> pathlib.Path | None:
        """What in the directory an event is about to change."""
        if event == "open":
            name, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITES
            names, folder = ((name,) if writes else ()), -1
        elif event in _CHANGES:
            names = [arguments[i] for i in _CHANGES[event]]
            folder = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
        else:
            return None
        for name in names:
            if not isinstance(name, (str, bytes, os.PathLike)):
                continue
            path = os.fsdecode(name)
            if not os.path.isabs(path) and isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            path = pathlib.Path(os.path.abspath(path))
            if path.is_relative_to(self._source):
                return path
        return None

    def _content(self) -> dict[pathlib.Path, bytes | None]:
        """All files and directories; other threads may be adding and removing some."""
        found: dict[pathlib.Path, bytes | None] = {}
        for folder, _, names in os.walk(self._source):
            inside = pathlib.Path(folder).relative_to(self._source)
            found[inside] = None
            for name in names:
                with contextlib.suppress(OSError):
                    found[inside / name] = pathlib.Path(folder, name).read_bytes()
        return found

    def _copy(self, reason: str) -> None:
        content = self._content()
        if content and content != self._last:
            self._last = content
            self._write(content, reason)

    def _cut(self, file: pathlib.Path, before: int, reason: str) -> None:
        name = file.relative_to(self._source)
        written = self._last.get(name)
        if written is not None and len(written) - before >= 2:
            half = written[: (before + len(written)) // 2]
            self._write({**self._last, name: half}, f"half of {name}, before {reason}")

    def _write(self, content: dict[pathlib.Path, bytes | None], reason: str) -> None:
        copy = self._target / f"{len(self.copies):04}"
        for name, data in content.items():
            if data is None:
                (copy / name).mkdir(parents=True)
            else:
                (copy / name).write_bytes(data)
        self.copies.append(copy)
        self.reasons.append(reason)


@contextlib.contextmanager
def recorded(source: pathlib.Path, target: pathlib.Path) -> Iterator[Instants]:
    """A context in which `source` is copied to `target` before everything that changes it."""
    instants, active = Instants(source, target), True

    def hook(event: str, arguments: tuple) -> None:
        if active:
            instants(event, arguments)

    sys.addaudithook(hook)  # it cannot be removed
    try:
        yield instants
    finally:
        active = False
