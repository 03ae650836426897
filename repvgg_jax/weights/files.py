"""Checkpoint files, detected by their contents: safetensors, `.npz`, `.pth`."""

import functools
import math
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from repvgg_jax.text import first_few, one_line
from repvgg_jax.weights import torch_pickle
from repvgg_jax.weights.tensor import Tensor

_MAX_DEFLATE = 1032  # the largest ratio that DEFLATE can reach


def read(path: str | os.PathLike) -> Any:
    """The contents of a file with a `Tensor` for every array; no array is read yet.

    Returns:
      A mapping from keys to `Tensor`; for `.pth` files whatever was saved.

    Raises:
      ValueError: no such file, unknown format, damaged, or a pickle that needs anything but
        tensors. The message is one line and starts with the path.
    """
    path = pathlib.Path(path)
    try:
        return _reader(path)(path)
    except Exception as error:
        # Whatever a hostile or damaged file makes the parsers below raise, it means one thing.
        reason = error.strerror if isinstance(error, OSError) else None
        text = one_line(reason or error, 400) or type(error).__name__
        raise ValueError(f"{path}: {text}") from error


def _reader(path: pathlib.Path) -> Callable[[pathlib.Path], Any]:
    """The reader for a file's format."""
    if not path.exists():
        raise ValueError("no such file")
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
            return torch_pickle.read_zip
        if names and all(name.endswith(".npy") for name in names):
            return _read_npz
        raise ValueError(f"a zip archive but not a checkpoint; it contains {first_few(names)}")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors
    if head[0] == 0x80 and len(head) > 2:
        return torch_pickle.read_legacy
    for signature, what in _NOT_CHECKPOINTS:
        if head.lstrip()[: len(signature)].lower() == signature:
            raise ValueError(f"{what}, not a checkpoint")
    raise ValueError(
        f"not a safetensors, .npz or .pth file: the first bytes are {head[:8].hex(' ')}; "
        "it may be damaged or truncated"
    )


_NOT_CHECKPOINTS = (
    (b"<!doctype", "a web page (does the download need a confirmation?)"),
    (b"<html", "a web page (does the download need a confirmation?)"),
    (b"version https://git-lfs", "a Git LFS pointer (run git lfs pull)"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive (decompress it first)"),
    (b"\x93numpy", "a single .npy array"),
)


def _read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    import safetensors

    # The library checks the header against the length of the file.
    file = safetensors.safe_open(os.fspath(path), framework="np")
    found = {}
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        array = file.get_slice(key)
        dtype = _SAFETENSORS.get(array.get_dtype(), array.get_dtype())
        read_it = functools.partial(file.get_tensor, key)
        found[key] = Tensor(tuple(array.get_shape()), dtype, read_it)
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
    """One array of an `.npz` file; its header must agree with the size of its record."""
    if info.compress_size > file_size or info.file_size > info.compress_size * _MAX_DEFLATE:
        raise ValueError(f"record {info.filename!r} claims an impossible size")
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
