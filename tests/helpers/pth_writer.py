"""Writes `.pth` files opcode by opcode, so that the reader is tested without PyTorch too."""

import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


def write_zip(
    path: pathlib.Path,
    state: Mapping[str, np.ndarray],
    wrapper: str = "",
    byteorder: str = "little",
) -> None:
    """The container of PyTorch 1.6 and later."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", state_pickle(state, wrapper))
        archive.writestr("archive/byteorder", byteorder)
        for index, array in enumerate(state.values()):
            stored = array.astype(array.dtype.newbyteorder({"little": "<", "big": ">"}[byteorder]))
            archive.writestr(f"archive/data/{index}", stored.tobytes())
        archive.writestr("archive/version", "3\n")


def write_legacy(path: pathlib.Path, state: Mapping[str, np.ndarray], wrapper: str = "") -> None:
    """The container before that."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    with open(path, "wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(header, file, protocol=2)
        file.write(state_pickle(state, wrapper, legacy=True))
        pickle.dump([str(index) for index in range(len(state))], file, protocol=2)
        for array in state.values():
            file.write(struct.pack("<q", array.size) + np.ascontiguousarray(array).tobytes())


def state_pickle(state: Mapping[str, np.ndarray], wrapper: str = "", legacy: bool = False) -> bytes:
    """A dictionary of tensors, each with a storage of its own, under `wrapper` if there is one."""
    out = io.BytesIO()
    out.write(b"\x80\x02")
    if wrapper:
        out.write(b"}" + text(wrapper))
    out.write(b"ccollections\nOrderedDict\n)R(")
    for index, (key, array) in enumerate(state.items()):
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
    return b"J" + struct.pack("<i", value)
