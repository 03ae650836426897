"""PyTorch's `.pth` files, read without PyTorch.

Two containers exist. Since PyTorch 1.6 a file is a zip archive of uncompressed records:
`NAME/data.pkl`, a pickle in which tensors refer to storages, and one `NAME/data/KEY` per
storage. Before, and still on request, it is five pickles one after another, followed by the
storages. Either is mapped into memory, so that only those numbers are read that are asked for.
"""

import dataclasses
import functools
import io
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

import numpy as np

from repvgg_jax.weights.tensor import BFLOAT16, Tensor
from repvgg_jax.weights.unpickling import Calls, Global, unpickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The number that the first pickle of the older container holds."""

_LEGACY_PROTOCOL = 1001
_MAX_RANK = 8

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}


def read_zip(path: str | os.PathLike) -> Any:
    """What was saved, with a `Tensor` for every tensor, from the zip container.

    Raises:
      ValueError: not such a container, damaged, or its pickle asks for anything else.
    """
    buffer = _map(path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a zip archive with {len(pickles)} data.pkl, so no PyTorch checkpoint")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in records:
        raise ValueError("a TorchScript archive; save the model's state_dict() instead")
    order = records.get(f"{prefix}byteorder")
    big_endian = order is not None and bytes(_record(buffer, order)) == b"big"

    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, numel: int) -> _Storage:
        info = records.get(f"{prefix}data/{key}")
        if info is None:
            raise ValueError(f"storage {key!r} is not in the archive")
        if info.file_size != numel * dtype.itemsize:
            raise ValueError(
                f"storage {key!r} has {info.file_size} bytes, not {numel} elements of {dtype}"
            )
        stored = dtype.newbyteorder(">") if big_endian else dtype
        found = storages.setdefault(key, _Storage(stored, numel, lambda: _record(buffer, info)))
        return found.described_as(stored, numel, key)

    return unpickle(io.BytesIO(_record(buffer, records[pickles[0]])), _CALLS, _resolver(storage))


def read_legacy(path: str | os.PathLike) -> Any:
    """What was saved, with a `Tensor` for every tensor, from the older container.

    Raises:
      ValueError: as `read_zip`.
    """
    buffer = _map(path)
    stream = cast(IO[bytes], buffer)
    if unpickle(stream, {}) != LEGACY_MAGIC:
        raise ValueError("a pickle, but no PyTorch checkpoint")
    if unpickle(stream, {}) != _LEGACY_PROTOCOL:
        raise ValueError(f"a PyTorch container of a version other than {_LEGACY_PROTOCOL}")
    system = unpickle(stream, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("a checkpoint of a big-endian machine in the older container")

    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, numel: int) -> _Storage:
        found = storages.setdefault(key, _Storage(dtype, numel, _absent))
        return found.described_as(dtype, numel, key)

    saved = unpickle(stream, _CALLS, _resolver(storage))
    order = unpickle(stream, {})
    if not isinstance(order, list) or not all(isinstance(key, str) for key in order):
        raise ValueError("damaged list of storages")
    if set(order) != storages.keys() or len(order) != len(storages):
        raise ValueError(f"{len(storages)} storages are referred to, {len(order)} are listed")
    offset = stream.tell()
    for key in order:
        found = storages[key]
        numel = int(struct.unpack("<q", _slice(buffer, offset, 8))[0])
        if numel != found.numel:
            raise ValueError(f"storage {key!r} has {numel} elements, not {found.numel}")
        length = numel * found.dtype.itemsize
        data = _slice(buffer, offset + 8, length)
        found.fetch = lambda data=data: data  # type: ignore[misc]
        offset += 8 + length
    return saved


@dataclasses.dataclass
class _Storage:
    """A run of elements, which tensors are views of."""

    dtype: np.dtype
    numel: int
    fetch: Callable[[], memoryview]

    @functools.cached_property
    def data(self) -> memoryview:
        """Its bytes, fetched and checked once."""
        return self.fetch()

    def described_as(self, dtype: np.dtype, numel: int, key: str) -> "_Storage":
        """Itself, where every tensor of it says the same about it."""
        if (self.dtype, self.numel) != (dtype, numel):
            raise ValueError(f"storage {key!r} is described in two ways")
        return self

    def view(self, offset: Any, shape: Any, strides: Any) -> Tensor:
        """The tensor that starts at `offset` and steps by `strides`, all in elements."""
        ranks_fit = len(shape) == len(strides) <= _MAX_RANK
        numbers = (offset, *shape, *strides) if ranks_fit else (-1,)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a tensor whose offset, shape and strides are no such numbers")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # An expanded tensor would need more memory than the file has elements for.
        if math.prod(shape) > self.numel or (math.prod(shape) and last >= self.numel):
            raise ValueError(
                f"a tensor of shape {tuple(shape)} at {offset} with strides {tuple(strides)} "
                f"does not fit into its storage of {self.numel} elements"
            )

        def read() -> np.ndarray:
            flat = np.frombuffer(self.data, self.dtype)[offset:]
            steps = tuple(step * self.dtype.itemsize for step in strides)
            return np.lib.stride_tricks.as_strided(flat, tuple(shape), steps, writeable=False)

        return Tensor(tuple(shape), self.dtype.newbyteorder("=").name, read)


def _resolver(
    storage: Callable[[np.dtype, str, int], _Storage],
) -> Callable[[Any], _Storage]:
    """Turns the persistent identifiers of PyTorch's pickles into storages."""

    def resolve(identifier: Any) -> _Storage:
        if not isinstance(identifier, tuple) or len(identifier) not in (5, 6):
            raise ValueError("a persistent identifier that PyTorch does not write")
        kind, of, key, _, numel, *view = identifier
        known = isinstance(of, Global) and of.module == "torch" and of.name in _STORAGES
        sound = isinstance(key, str) and type(numel) is int and numel >= 0
        if kind != "storage" or not known or not sound or view not in ([], [None]):
            raise ValueError("a persistent identifier that PyTorch does not write")
        return storage(_STORAGES[of.name], key, numel)

    return resolve


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not (isinstance(storage, _Storage) and type(shape) is tuple and type(strides) is tuple):
        raise ValueError("a tensor that is not made of a storage, a shape and strides")
    return storage.view(offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


_CALLS: Calls = {
    Global("collections", "OrderedDict"): lambda: {},
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **dict.fromkeys(Global("torch", name) for name in _STORAGES),
}


def _map(path: str | os.PathLike) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _slice(buffer: mmap.mmap, offset: int, length: int) -> memoryview:
    if not 0 <= offset <= offset + length <= len(buffer):
        raise ValueError(
            f"truncated: {length} bytes are expected at {offset}, the file has {len(buffer)}"
        )
    return memoryview(buffer)[offset : offset + length]


def _record(buffer: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of a zip archive's record, checked against its checksum."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"record {info.filename!r} is compressed, which PyTorch never does")
    # The local header repeats the name and adds padding; only its own lengths count.
    header = _slice(buffer, info.header_offset, 30)
    if bytes(header[:4]) != b"PK\x03\x04":
        raise ValueError(f"record {info.filename!r} is not where the archive says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    data = _slice(buffer, start, info.file_size)
    # Zero stands for a checksum that PyTorch was told not to compute.
    if info.CRC not in (0, zlib.crc32(data)):
        raise ValueError(f"record {info.filename!r} does not match its checksum: damaged")
    return data


def _absent() -> memoryview:
    raise ValueError("a storage that the file does not hold")
