"""Writes `.pth` files opcode by opcode, so that the reader is tested without PyTorch too."""

import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

LEGACY = b"".join(
    pickle.dumps(header, protocol=2)
    for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
)
"""What precedes the pickle in the container before PyTorch 1.6."""

STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


def write_zip(
    path: pathlib.Path,
    state: Mapping[str, np.ndarray],
    wrapper: str = "",
    byteorder: str = "little",
    **options: Any,
) -> None:
    """The container of PyTorch 1.6 and later; `options` are those of `state_pickle`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", state_pickle(state, wrapper, **options))
        archive.writestr("archive/byteorder", byteorder)
        for index, array in enumerate(state.values()):
            stored = array.astype(array.dtype.newbyteorder({"little": "<", "big": ">"}[byteorder]))
            archive.writestr(f"archive/data/{index}", stored.tobytes())
        archive.writestr("archive/version", "3\n")


def write_legacy(path: pathlib.Path, state: Mapping[str, np.ndarray], wrapper: str = "") -> None:
    """The container before that."""
    with open(path, "wb") as file:
        file.write(LEGACY)
        file.write(state_pickle(state, wrapper, legacy=True))
        pickle.dump([str(index) for index in range(len(state))], file, protocol=2)
        for array in state.values():
            file.write(struct.pack("<q", array.size) + np.ascontiguousarray(array).tobytes())


def state_pickle(
    state: Mapping[str, np.ndarray],
    wrapper: str = "",
    legacy: bool = False,
    beside: bytes = b"",
    replaced: Mapping[str, bytes] | None = None,
) -> bytes:
    """A dictionary of tensors, each with a storage of its own.

    Args:
      state: the arrays by their keys.
      wrapper: a key of a dictionary around it.
      legacy: for the older container.
      beside: a pickle whose value is under the key `beside` next to `wrapper`.
      replaced: opcodes that push something else than the tensor of a key.
    """
    out = io.BytesIO()
    out.write(b"\x80\x02")
    if wrapper:
        out.write(b"}")
    if beside:
        start = 2 if beside[:1] == b"\x80" else 0
        out.write(text("beside") + beside[start:].removesuffix(b".") + b"s")
    if wrapper:
        out.write(text(wrapper))
    out.write(b"ccollections\nOrderedDict\n)R(")
    for index, (key, array) in enumerate(state.items()):
        if other := (replaced or {}).get(key):
            out.write(text(key) + other)
            continue
        steps = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
        out.write(text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n(")
        out.write(b"(" + text("storage") + f"ctorch\n{STORAGES[array.dtype.name]}\n".encode())
        out.write(text(str(index)) + text("cpu") + integer(array.size))
        out.write((b"N" if legacy else b"") + b"tQ" + integer(0))
        out.write(b"(" + b"".join(map(integer, array.shape)) + b"t")
        out.write(b"(" + b"".join(map(integer, steps)) + b"t")
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")
    out.write(b"u" + (b"s" if wrapper else b"") + b".")
    return out.getvalue()


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    """The opcode that pushes an integer."""
    if not -(1 << 31) <= value < 1 << 31:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8b" + struct.pack("<i", len(data)) + data
    return b"J" + struct.pack("<i", value)
