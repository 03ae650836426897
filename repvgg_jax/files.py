"""Atomic writes: a file is either the old one or the new one, also after a crash."""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from typing import Any

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary name next to `path`, which takes its place if the body succeeds.

    The body writes a file or a directory of that name. It is flushed to disk before it is renamed,
    and so is the rename. What was at `path` is there until then; a directory is exchanged in one
    operation if the file system can. If it cannot, and the process is killed between two renames,
    the next use with this path puts the old directory back. After an error nothing is left behind,
    and `path` is as it was. The temporary name keeps the suffix of `path`. Modes follow the
    umask, also where a writer (safetensors) creates private files.

    Raises:
      OSError: the parent directory cannot be created or written.
    """
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if (old := interrupted(path)) is not None:
        old.replace(path)
    unique = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.stem}.{unique}{path.suffix}")
    try:
        yield temporary
        written = temporary.rglob("*") if temporary.is_dir() else [temporary]
        for file in written:
            # A file with a second hard link existed before; leave its mode alone.
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                _follow_umask(file)
        sync(temporary)
        if temporary.is_dir() and path.exists():
            _exchange(temporary, path, aside=path.with_name(f".{path.name}.{unique}.old"))
        else:
            temporary.replace(path)
        sync_directory(path.parent)
    finally:
        remove(temporary)


def interrupted(path: pathlib.Path) -> pathlib.Path | None:
    """What was at `path` before a process was killed while it replaced it; None if nothing was."""
    if path.exists():
        return None
    found = (entry for entry in leftovers(path) if entry.suffix == ".old")
    return max(found, key=lambda entry: entry.stat().st_mtime, default=None)


def leftovers(path: pathlib.Path) -> list[pathlib.Path]:
    """What `replacing(path)` left next to it when its process was killed, or writes right now."""
    names = re.compile(
        rf"\.({re.escape(path.stem)}\.[0-9a-f]{{8}}{re.escape(path.suffix)}"
        rf"|{re.escape(path.name)}\.[0-9a-f]{{8}}\.old)"
    )
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(entry for entry in found if names.fullmatch(entry.name))


def remove(path: pathlib.Path) -> None:
    """Removes a file or a directory, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sync(path: pathlib.Path) -> None:
    """Flushes a file, or a directory and everything in it, to disk.

    Raises:
      OSError: a file could not be written.
    """
    if not path.is_dir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            file = pathlib.Path(folder, name)
            if file.is_file() and not file.is_symlink():
                sync(file)
        sync_directory(pathlib.Path(folder))


def sync_directory(path: pathlib.Path) -> None:
    """Flushes the names in a directory to disk, if its file system knows how to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(new: pathlib.Path, path: pathlib.Path, *, aside: pathlib.Path) -> None:
    """Puts `new` in the place of `path`, whose old content is then removed."""
    if _exchange_at_once(new, path):
        return
    path.replace(aside)
    try:
        new.replace(path)
    except OSError:
        aside.replace(path)
        raise
    remove(aside)


def _exchange_at_once(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Exchanges two names atomically; False if system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:  # not Linux
        return False
    return renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _follow_umask(file: pathlib.Path) -> None:
    """Gives a file the permissions that `open` would have given it."""
    mode = stat.S_IMODE(file.stat().st_mode)
    wanted = mode | (0o666 & ~_umask())
    if wanted != mode:
        file.chmod(wanted)


def _umask() -> int:
    """The umask of this process."""
    status = pathlib.Path("/proc/self/status")  # reading it otherwise means to set it
    with contextlib.suppress(OSError):
        if found := re.search(r"^Umask:\s*([0-7]+)", status.read_text(), re.M):
            return int(found[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """Opens a regular file; a pipe or a device, which may never end, is refused.

    Raises:
      OSError: it cannot be opened, or is something else.
    """
    # Without O_NONBLOCK, opening a pipe waits for whoever writes to it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        what = "a directory" if pathlib.Path(path).is_dir() else "a pipe or a device"
        raise OSError(f"{path} is {what}, not a file")
    return os.fdopen(descriptor, "rb")


def cache_directory() -> pathlib.Path | None:
    """Where this package may keep files of this user; None for a user without a home."""
    try:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError:  # as of users of containers that have a number only
        return None
    return base / "repvgg_jax"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically, in UTF-8, with escapes for what that cannot hold."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
      OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
      ValueError: it is not JSON, e.g. because it is damaged.
      OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return parse_json(file.read())


def parse_json(data: str | bytes) -> Any:
    """JSON values; raises ValueError for anything else, also if it is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not text") from error


def is_below(name: str) -> bool:
    """Whether a path with `/` in it, joined to a directory, stays below that directory."""
    parts = pathlib.PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def json_digest(content: Any) -> str:
    """The SHA-256 of JSON values, whatever their spaces and the order of their keys."""
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what `replacing` left in a directory when its process was killed.

    No process may be writing there.
    """
    for path in directory.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}(\..*)?", path.name):
            remove(path)
