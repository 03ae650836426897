"""Zip archives of unknown origin: how much their directories and records may claim."""

import io
import os
import zipfile

_MAX_DIRECTORY = 4 << 20  # bytes; a record of PyTorch's takes about a hundred
_MAX_EXPANSION = 32  # weights compress by a tenth, those of a pruned network at most so much
_ALWAYS = 64 << 20  # bytes that any archive may expand to


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """Opens an archive, unless it is a zip bomb; its file is closed when nothing refers to it.

    Raises:
      ValueError: a directory larger than that of any network's weights; records that overlap, or
        that expand far more than weights do.
      zipfile.BadZipFile: not an archive.
    """
    archive = zipfile.ZipFile(_Bounded(path))
    infos = archive.infolist()
    size = os.path.getsize(path)
    stored = sum(info.compress_size for info in infos)
    if stored > size:
        raise ValueError(f"its records take {stored:,} bytes, but the file has {size:,}")
    expanded = sum(info.file_size for info in infos)
    if expanded > _ALWAYS + _MAX_EXPANSION * stored:
        raise ValueError(
            f"its {stored:,} bytes expand to {expanded:,}; weights expand at most "
            f"{_MAX_EXPANSION} times"
        )
    return archive


class _Bounded(io.FileIO):
    """A file that `zipfile` reads the directory of in one go, at the size that it claims."""

    def read(self, size: int | None = -1) -> bytes:
        """As `io.FileIO.read`, if it is not too much."""
        left = os.fstat(self.fileno()).st_size - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > _MAX_DIRECTORY:
            raise ValueError(f"its directory claims {wanted:,} bytes, at most {_MAX_DIRECTORY:,}")
        return super().read(wanted)

    def __del__(self) -> None:
        """Closes the file: `zipfile` does not close what it was given."""
        self.close()
