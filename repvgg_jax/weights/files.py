"""Checkpoint files, told apart by what is in them: safetensors, `.npz`, `.pth`."""

import functools
import math
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from repvgg_jax.weights import pth
from repvgg_jax.weights.tensor import Tensor
from repvgg_jax.weights.wording import brief, some

_MAX_DEFLATE = 1032  # no deflated byte stands for more bytes than this


def read(path: str | os.PathLike) -> Any:
    """A file's contents, with a `Tensor` for every array; nothing large is read yet.

    Returns:
      A mapping from keys to `Tensor`, or for `.pth` files whatever was saved.

    Raises:
      ValueError: no such file, no format that is known, damaged, or a pickle that asks for
        anything but tensors. The one line names the file.
    """
    path = pathlib.Path(path)
    try:
        return _reader(path)(path)
    except Exception as error:
        # Whatever a hostile or damaged file makes the parsers below raise, it means one thing.
        reason = error.strerror if isinstance(error, OSError) else None
        text = brief(reason or error, 400) or type(error).__name__
        raise ValueError(f"{path}: {text}") from error


def _reader(path: pathlib.Path) -> Callable[[pathlib.Path], Any]:
    """The reader for a file's format."""
    if not path.exists():
        raise ValueError("there is no such file")
    if path.is_dir():
        raise ValueError("a directory; give one .safetensors, .npz or .pth file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError("the file is empty")
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/data.pkl") for name in names):
            return pth.read_zip
        if names and all(name.endswith(".npy") for name in names):
            return _read_npz
        raise ValueError(f"a zip archive but no checkpoint: it holds {some(names)}")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors
    if head[0] == 0x80 and len(head) > 2:
        return pth.read_legacy
    for signature, what in _NO_CHECKPOINTS:
        if head.lstrip()[: len(signature)].lower() == signature:
            raise ValueError(f"{what}, no checkpoint")
    raise ValueError(
        "neither safetensors nor .npz nor .pth by its first bytes "
        f"({head[:8].hex(' ')}); is it damaged or cut off?"
    )


_NO_CHECKPOINTS = (
    (b"<!doctype", "a web page (did a download ask for a confirmation?)"),
    (b"<html", "a web page (did a download ask for a confirmation?)"),
    (b"version https://git-lfs", "a Git LFS pointer (git lfs pull fetches the file itself)"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"\x93numpy", "a single .npy array"),
)


def _read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    import safetensors

    # The library checks its header against the length of the file.
    file = safetensors.safe_open(os.fspath(path), framework="np")
    found = {}
    for key in file.keys():  # noqa: SIM118 (no mapping)
        piece = file.get_slice(key)
        name = _SAFETENSORS.get(piece.get_dtype(), piece.get_dtype())
        read_it = functools.partial(file.get_tensor, key)
        found[key] = Tensor(tuple(piece.get_shape()), name, read_it)
    return found


_SAFETENSORS = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


def _read_npz(path: pathlib.Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return {
            info.filename.removesuffix(".npy"): _npy(path, archive, info, size)
            for info in archive.infolist()
        }


def _npy(
    path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, file_size: int
) -> Tensor:
    """One array of an `.npz` file, whose header must agree with what the archive holds."""
    if info.compress_size > file_size or info.file_size > info.compress_size * _MAX_DEFLATE:
        raise ValueError(f"record {info.filename!r} says it is larger than it can be")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"record {info.filename!r} has .npy version {version}")
        length = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or length != info.file_size or any(n < 0 for n in shape):
        raise ValueError(f"record {info.filename!r} is not an array of shape {shape}, {dtype}")

    def read() -> np.ndarray:
        with zipfile.ZipFile(path) as archive, archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return Tensor(tuple(shape), dtype.name, read)
