"""PyTorch's `.pth` files, read without PyTorch and without running code.

There are two containers. Since PyTorch 1.6 a file is a zip archive of uncompressed records:
`NAME/data.pkl`, a pickle in which tensors refer to storages, and one `NAME/data/KEY` per
storage. Before that, and still on request, it is five consecutive pickles followed by the
storages. Either is memory-mapped, so only the arrays that are used are read.

`repvgg_jax.weights.unpickle` reads the pickles. What they name beside tensors and ordered
dictionaries stays a placeholder, and so does a tensor that is made of one.
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
from typing import Any

import numpy as np

from repvgg_jax.weights.archive import open_zip
from repvgg_jax.weights.tensor import BFLOAT16, Tensor
from repvgg_jax.weights.unpickle import (
    MAX_NAME,
    MAX_SIZE,
    Calls,
    Contents,
    Global,
    LimitError,
    Placeholder,
    unpickle,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
_LEGACY_PROTOCOL = 1001
_MAX_RANK = 8
_MAX_NUMBER = 1 << 62  # of elements; the product of two is quickly computed

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
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "QInt8Storage": np.dtype(np.int8),
    "QUInt8Storage": np.dtype(np.uint8),
    "QInt32Storage": np.dtype(np.int32),
}


def read_zip(path: str | os.PathLike) -> Contents:
    """What was saved in a zip container, with a `Tensor` for every tensor.

    Raises:
      ValueError: not such a container, damaged, or larger than that of any network.
    """
    buffer = _map(path)
    with open_zip(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a zip archive with {len(pickles)} data.pkl; a PyTorch checkpoint has 1")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in records:
        raise ValueError("a TorchScript archive; save the model's state_dict() instead")
    order = records.get(f"{prefix}byteorder")
    big_endian = order is not None and bytes(_record(buffer, order)[:4]) == b"big"
    pickle = records[pickles[0]]
    if pickle.file_size > MAX_SIZE:
        raise LimitError(f"its pickle has {pickle.file_size:,} bytes, at most {MAX_SIZE:,}")

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

    return unpickle(io.BytesIO(_record(buffer, pickle)), _CALLS, _resolver(storage))


def read_legacy(path: str | os.PathLike) -> Contents:
    """What was saved in the older container, with a `Tensor` for every tensor.

    Raises:
      ValueError: as `read_zip`.
    """
    buffer = _map(path)
    stream = io.BytesIO(memoryview(buffer)[:MAX_SIZE])
    if unpickle(stream, {}).value != _LEGACY_MAGIC:
        raise ValueError("a pickle but not a PyTorch checkpoint")
    if unpickle(stream, {}).value != _LEGACY_PROTOCOL:
        raise ValueError(f"a PyTorch container of a version other than {_LEGACY_PROTOCOL}")
    system = unpickle(stream, {}).value
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("an old checkpoint of a big-endian machine")

    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, numel: int) -> _Storage:
        found = storages.setdefault(key, _Storage(dtype, numel, _absent))
        return found.described_as(dtype, numel, key)

    saved = unpickle(stream, _CALLS, _resolver(storage))
    order = unpickle(stream, {}).value
    if not isinstance(order, list) or not all(map(_is_storage_key, order)):
        raise ValueError("damaged: the list of storages is invalid")
    if set(order) != storages.keys() or len(order) != len(storages):
        raise ValueError(
            f"damaged: {len(storages)} storages of known types are used, {len(order)} are listed"
        )
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
    """A buffer of elements that tensors are views of."""

    dtype: np.dtype
    numel: int
    fetch: Callable[[], memoryview]

    @functools.cached_property
    def data(self) -> memoryview:
        """Bytes of the storage, fetched and verified once."""
        return self.fetch()

    def described_as(self, dtype: np.dtype, numel: int, key: str) -> "_Storage":
        """This storage; raises ValueError unless all its tensors agree on dtype and size."""
        if (self.dtype, self.numel) != (dtype, numel):
            raise ValueError(f"storage {key!r} has contradictory descriptions")
        return self

    def view(self, offset: Any, shape: Any, strides: Any) -> Tensor:
        """The tensor at `offset` with `strides`, all in elements."""
        ranks_fit = len(shape) == len(strides) <= _MAX_RANK
        numbers = (offset, *shape, *strides) if ranks_fit else (-1,)
        if not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers):
            raise ValueError("invalid tensor offset, shape or strides")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # The product: an expanded tensor would need more memory than the file has.
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
) -> Callable[[Any], _Storage | Placeholder]:
    """A function from the persistent identifiers of PyTorch's pickles to storages."""

    def resolve(identifier: Any) -> _Storage | Placeholder:
        if not isinstance(identifier, tuple) or len(identifier) not in (4, 5, 6):
            raise ValueError("invalid persistent identifier")
        if len(identifier) == 4:  # a class and its source text, in the older container
            if identifier[0] == "module" and isinstance(identifier[1], Placeholder):
                return identifier[1]
            raise ValueError("invalid persistent identifier")
        kind, of, key, _, numel, *view = identifier
        valid = _is_storage_key(key) and type(numel) is int and 0 <= numel < _MAX_NUMBER
        if kind != "storage" or not valid or view not in ([], [None]):
            raise ValueError("invalid persistent identifier")
        if isinstance(of, Placeholder):  # e.g. of quantized numbers
            return of
        if not (isinstance(of, Global) and of.module == "torch" and of.name in _STORAGES):
            raise ValueError("invalid persistent identifier")
        return storage(_STORAGES[of.name], key, numel)

    return resolve


def _is_storage_key(key: Any) -> bool:
    return isinstance(key, str) and len(key) <= MAX_NAME


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
    for part in (storage, offset, shape, strides):
        if isinstance(part, Placeholder):
            return part
    if not (isinstance(storage, _Storage) and type(shape) is tuple and type(strides) is tuple):
        raise ValueError("a tensor that is not made of a storage, a shape and strides")
    return storage.view(offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor | Placeholder:
    if not isinstance(tensor, (Tensor, Placeholder)):
        raise ValueError("a parameter that is not a tensor")
    return tensor


def _map(path: str | os.PathLike) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _slice(buffer: mmap.mmap, offset: int, length: int) -> memoryview:
    if not 0 <= offset <= offset + length <= len(buffer):
        raise ValueError(
            f"truncated: {length} bytes expected at {offset}, the file has {len(buffer)}"
        )
    return memoryview(buffer)[offset : offset + length]


def _record(buffer: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of a record of a zip archive, verified by its checksum."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"record {info.filename!r} is compressed, which PyTorch never does")
    # The local header repeats the name and adds padding, with lengths of its own.
    header = _slice(buffer, info.header_offset, 30)
    if bytes(header[:4]) != b"PK\x03\x04":
        raise ValueError(f"record {info.filename!r} is not at its offset in the directory")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    data = _slice(buffer, start, info.file_size)
    # Zero: PyTorch was configured not to compute checksums.
    if info.CRC not in (0, zlib.crc32(data)):
        raise ValueError(f"record {info.filename!r} is damaged: wrong checksum")
    return data


def _absent() -> memoryview:
    raise ValueError("a storage that is not in the file")


_CALLS: Calls = {
    Global("collections", "OrderedDict"): lambda: {},
    Global("collections", "defaultdict"): lambda *_: {},
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    **dict.fromkeys(Global("torch", name) for name in _STORAGES),
}
