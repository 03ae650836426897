"""A lock on a directory, across machines.

Between runs on one machine `flock` decides; the kernel releases it however its process ends.
Between machines, and on file systems without locks, a file does: its owner writes a heartbeat
into it, so watching it for longer than that shows whether the owner is alive. Clocks of machines
are not compared.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from repvgg_jax import files
from repvgg_jax.text import one_line

_log = logging.getLogger(__name__)

FILE = "owner.json"
HEARTBEAT = 10.0  # seconds between two heartbeats
TIMEOUT = 25.0  # seconds without one after which an owner on another machine counts as gone
_LOOKS = 50  # at another's file within the timeout


@contextlib.contextmanager
def locked(
    directory: pathlib.Path,
    *,
    heartbeat: float = HEARTBEAT,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """A context in which the directory belongs to this process.

    Args:
      directory: must exist.
      heartbeat: seconds between two heartbeats.
      sleep: how to wait while another's file is watched.

    Raises:
      ValueError: another run is using it.
      OSError: it cannot be written.
    """
    # flock on the directory itself leaves no file behind.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        flocked = _flock(descriptor, directory)
        if not flocked:
            _log.warning(
                "%s is on a file system without locks; other runs there are noticed by their %s",
                directory,
                FILE,
            )
        _check_owner(directory / FILE, sleep, flocked=flocked)
        with _Owner(directory / FILE).alive(heartbeat):
            yield
    finally:
        os.close(descriptor)


def machine_id() -> str:
    """An id that differs between machines, and between boots of one."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _flock(descriptor: int, directory: pathlib.Path) -> bool:
    """Locks the directory; returns False if its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{directory} is in use by another run on this machine; wait until it ends, or give "
            "another --workdir"
        ) from error
    except OSError:  # ENOLCK, ENOSYS, ENOTSUP, or EBADF from NFS for a directory
        return False
    return True


def _check_owner(file: pathlib.Path, sleep: Callable[[float], None], *, flocked: bool) -> None:
    """Removes the file of an owner that is gone; raises ValueError if the owner is alive."""
    before = _read(file)
    if before is None:
        return
    owner = _parse(before)
    began = one_line(owner.get("began", "?"))
    who = one_line(f"process {owner.get('pid', '?')} on {owner.get('host', '?')}")
    if not flocked or owner.get("machine") != machine_id():
        _log.warning("%s belongs to %s: watching it for %.0f s", file, who, TIMEOUT)
        for _ in range(_LOOKS):
            sleep(TIMEOUT / _LOOKS)
            now = _read(file)
            if now is None:
                return  # it has just ended
            if now != before:
                raise ValueError(
                    f"{file.parent} is in use by {who}, which began at {began}; wait until it "
                    "ends, or give another --workdir"
                )
        _log.warning("%s is gone: this run takes over", who)
    file.unlink(missing_ok=True)


class _Owner:
    """The file with which this process shows that it is alive."""

    def __init__(self, file: pathlib.Path):
        self._file = file
        self._beats, self._ended = 0, threading.Event()
        self._owner = {
            "host": platform.node(),
            "machine": machine_id(),
            "pid": os.getpid(),
            "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }

    @contextlib.contextmanager
    def alive(self, heartbeat: float) -> Iterator[None]:
        """A context in which the file exists and is written every `heartbeat` seconds."""
        try:
            with self._file.open("x") as file:  # only one of two simultaneous starts succeeds
                file.write(self._text())
        except FileExistsError as error:
            raise ValueError(
                f"{self._file.parent} was claimed by another run at this moment; give another "
                "--workdir"
            ) from error
        thread = threading.Thread(target=self._run, args=(heartbeat,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            with contextlib.suppress(OSError):  # what ended the run matters more
                if self._is_own():
                    self._file.unlink(missing_ok=True)

    def _run(self, heartbeat: float) -> None:
        warned = False
        while not self._ended.wait(heartbeat):
            try:
                if not self._beat():
                    return
            except OSError as error:  # of a network file system, for a moment perhaps
                if not warned:
                    _log.warning("%s: a heartbeat is left out: %s", self._file, one_line(error))
                warned = True

    def _beat(self) -> bool:
        """Writes a heartbeat; returns False if the directory is no longer this run's."""
        if not self._is_own():
            if self._file.exists():
                _log.warning(
                    "%s was taken over by another run; stop one of them", self._file.parent
                )
            return False
        self._beats += 1
        # Overwrite in place with the same length, so it works on a full disk.
        with self._file.open("r+") as file:
            file.write(self._text())
        return True

    def _is_own(self) -> bool:
        found = _parse(_read(self._file) or "")
        return {name: found.get(name) for name in self._owner} == self._owner

    def _text(self) -> str:
        return json.dumps({**self._owner, "beat": f"{self._beats:012}"}) + "\n"


def _read(file: pathlib.Path) -> str | None:
    """None if it does not exist; a damaged file reads as another owner's."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    try:
        content = files.parse_json(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
