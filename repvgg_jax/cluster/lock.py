"""Who a run's directory belongs to at the moment, on whatever machine it is.

Between runs on one machine a lock of the file system decides, which ends with its process, however
that ends. Between machines, and where a file system knows no locks, a file does: its owner writes
into it every few seconds, so watching it for a little longer tells one that is at work from one
that is gone. Clocks are not compared.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

FILE = "owner.json"
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 25.0  # seconds without one after which an owner on another machine is gone


@contextlib.contextmanager
def owned(directory: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
    """A context in which the directory is this process's.

    Args:
      directory: which must exist.
      say: told, in a line, what is waited for and what was found.

    Raises:
      ValueError: another run is at work there.
      OSError: it cannot be written.
    """
    # A lock on the directory itself leaves nothing behind.
    handle = os.open(directory, os.O_RDONLY)
    try:
        locked = _lock(handle, directory)
        if not locked:
            say(
                f"{directory} is on a file system without locks: other runs there are noticed by "
                f"their {FILE}"
            )
        mark = _Mark(directory / FILE, say)
        _outlive(directory / FILE, say, locked=locked)
        with mark.kept():
            yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: pathlib.Path) -> bool:
    """Whether the directory could be locked; not where its file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{directory} is in use by another run on this machine; wait for its end, or give "
            "another --workdir"
        ) from error
    except OSError:  # ENOLCK, ENOSYS, ENOTSUP, NFS's EBADF for a directory: each in its own words
        return False
    return True


def _outlive(file: pathlib.Path, say: Callable[[str], None], *, locked: bool) -> None:
    """Returns when no other run is at work; raises ValueError where one is."""
    before = _read(file)
    if before is None:
        return
    owner = _parse(before)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    if not locked or owner.get("machine") != _machine():
        say(f"{file} is that of {who}: watching for {PATIENCE:.0f} s whether it is at work")
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE:
            time.sleep(min(0.5, PATIENCE / 10))
            now = _read(file)
            if now is None:
                return  # it has just ended
            if now != before:
                raise ValueError(
                    f"{file.parent} is in use by {who}, which began at "
                    f"{owner.get('began', '?')}; wait for its end, or give another --workdir"
                )
        say(f"{who} is gone: this run takes over")
    file.unlink(missing_ok=True)


class _Mark:
    """The file in which an owner shows that it is at work."""

    def __init__(self, file: pathlib.Path, say: Callable[[str], None]):
        self._file, self._say = file, say
        self._beats, self._ended = 0, threading.Event()
        self._owner = {
            "host": platform.node(),
            "machine": _machine(),
            "pid": os.getpid(),
            "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A context in which the file is there and shows signs of life."""
        try:
            with self._file.open("x") as file:  # of two that begin at once, one
                file.write(self._text())
        except FileExistsError as error:
            raise ValueError(
                f"{self._file.parent} was claimed by another run at this moment; give another "
                "--workdir"
            ) from error
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            if self._is_own():
                self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            if not self._is_own():
                if self._file.exists():
                    self._say(
                        f"{self._file.parent} was taken over by another run; stop one of them"
                    )
                return
            self._beats += 1
            # Over itself and as long as it was: that needs no space on a disk that is full.
            with contextlib.suppress(OSError), self._file.open("r+") as file:
                file.write(self._text())

    def _is_own(self) -> bool:
        found = _parse(_read(self._file) or "")
        return {name: found.get(name) for name in self._owner} == self._owner

    def _text(self) -> str:
        return json.dumps({**self._owner, "beat": f"{self._beats:012}"}) + "\n"


def _read(file: pathlib.Path) -> str | None:
    """None where there is none; a damaged one is like any that is not this run's."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _machine() -> str:
    """Something that no two machines share, nor one before and after it was started anew."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
