"""Atomic writes: a file is either the old one or the new one, also after a crash."""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import stat
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary name next to `path`, which takes its place if the body succeeds.

    The body writes a file or a directory of that name. A file is flushed to disk before the
    rename; an existing directory at `path` is replaced. After an error nothing is left behind,
    and `path` is as it was. The temporary name keeps the suffix of `path`. Modes follow the
    umask, also where a writer (safetensors) creates private files.

    Raises:
      OSError: the parent directory cannot be created or written.
    """
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.stem}.{unique}{path.suffix}")
    replaced = path.with_name(f".{path.name}.{unique}.old")
    try:
        yield temporary
        if temporary.is_dir():
            for inner in temporary.rglob("*"):
                # A file with a second name was there before; its mode is its owner's matter.
                if inner.is_file() and not inner.is_symlink() and inner.stat().st_nlink == 1:
                    _follow_umask(inner)
            if path.exists():
                path.replace(replaced)
        else:
            _follow_umask(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        for leftover in (temporary, replaced):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)


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


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what `replacing` left in a directory when its process was killed.

    No process may be writing there.
    """
    for path in directory.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}(\..*)?", path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
