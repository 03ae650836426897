"""PyTorch's `.pth` files, read without PyTorch and without running code.

There are two containers. Since PyTorch 1.6 a file is a zip archive of uncompressed records:
`NAME/data.pkl`, a pickle in which tensors refer to storages, and one `NAME/data/KEY` per
storage. Before that, and still on request, it is five consecutive pickles followed by the
storages. Either is memory-mapped, so only the arrays that are used are read.

Python's own unpickler imports and calls whatever a file names, so a checkpoint can run code.
`unpickle` never imports anything: a global is a pair of words, and the file is refused unless
the caller listed that pair. It allocates nothing beyond what the file contains, whatever
lengths and indices its opcodes claim. `pickletools` of the standard library splits the file
into opcodes.
"""

import dataclasses
import functools
import io
import math
import mmap
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple, cast

import numpy as np

from repvgg_jax.text import one_line
from repvgg_jax.weights.tensor import BFLOAT16, Tensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
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
    """What was saved in a zip container, with a `Tensor` for every tensor.

    Raises:
      ValueError: not such a container, damaged, or its pickle needs anything but tensors.
    """
    buffer = _map(path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a zip archive with {len(pickles)} data.pkl; a PyTorch checkpoint has 1")
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
    """What was saved in the older container, with a `Tensor` for every tensor.

    Raises:
      ValueError: as `read_zip`.
    """
    buffer = _map(path)
    stream = cast(IO[bytes], buffer)
    if unpickle(stream, {}) != _LEGACY_MAGIC:
        raise ValueError("a pickle but not a PyTorch checkpoint")
    if unpickle(stream, {}) != _LEGACY_PROTOCOL:
        raise ValueError(f"a PyTorch container of a version other than {_LEGACY_PROTOCOL}")
    system = unpickle(stream, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("an old checkpoint of a big-endian machine")

    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, numel: int) -> _Storage:
        found = storages.setdefault(key, _Storage(dtype, numel, _absent))
        return found.described_as(dtype, numel, key)

    saved = unpickle(stream, _CALLS, _resolver(storage))
    order = unpickle(stream, {})
    if not isinstance(order, list) or not all(isinstance(key, str) for key in order):
        raise ValueError("damaged: the list of storages is invalid")
    if set(order) != storages.keys() or len(order) != len(storages):
        raise ValueError(f"damaged: {len(storages)} storages are used, {len(order)} are listed")
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
        """Its bytes, fetched and verified once."""
        return self.fetch()

    def described_as(self, dtype: np.dtype, numel: int, key: str) -> "_Storage":
        """Itself, if all its tensors agree about it."""
        if (self.dtype, self.numel) != (dtype, numel):
            raise ValueError(f"storage {key!r} has contradictory descriptions")
        return self

    def view(self, offset: Any, shape: Any, strides: Any) -> Tensor:
        """The tensor at `offset` with `strides`, all in elements."""
        ranks_fit = len(shape) == len(strides) <= _MAX_RANK
        numbers = (offset, *shape, *strides) if ranks_fit else (-1,)
        if not all(type(number) is int and number >= 0 for number in numbers):
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
) -> Callable[[Any], _Storage]:
    """A function from the persistent identifiers of PyTorch's pickles to storages."""

    def resolve(identifier: Any) -> _Storage:
        if not isinstance(identifier, tuple) or len(identifier) not in (5, 6):
            raise ValueError("invalid persistent identifier")
        kind, of, key, _, numel, *view = identifier
        known = isinstance(of, Global) and of.module == "torch" and of.name in _STORAGES
        valid = isinstance(key, str) and type(numel) is int and numel >= 0
        if kind != "storage" or not known or not valid or view not in ([], [None]):
            raise ValueError("invalid persistent identifier")
        return storage(_STORAGES[of.name], key, numel)

    return resolve


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not (isinstance(storage, _Storage) and type(shape) is tuple and type(strides) is tuple):
        raise ValueError("a tensor that is not made of a storage, a shape and strides")
    return storage.view(offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
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


class Global(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


Calls = Mapping[Global, Callable[..., Any] | None]
"""What a file may name: a function to call, or None for a name that is only a value.

Functions must not copy their arguments: a file can refer to one long list many times, and
memory would no longer be bounded by the size of the file.
"""


def unpickle(
    stream: IO[bytes], calls: Calls, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Reads one pickle and leaves the stream at its end.

    Args:
      stream: needs `read`, `readline` and `tell`.
      calls: the globals that the pickle may name.
      persistent: maps a persistent identifier to its object.

    Raises:
      ValueError: the pickle names another global, or is damaged.
    """
    machine = _Machine(calls, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        if isinstance(error, RefusedError):
            raise
        # Opcodes in an order that no pickler writes raise any of these.
        raise ValueError(f"damaged pickle: {one_line(error)}") from error
    raise ValueError("damaged pickle: no STOP")


class RefusedError(ValueError):
    """A pickle needs something that weights do not need."""


_MARK = object()


class _Machine:
    """The stack and the memo of a pickle's opcodes."""

    def __init__(self, calls: Calls, persistent: Callable[[Any], Any] | None):
        self.calls = calls
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _IGNORED:
            pass
        elif opcode in _PUTS:
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
        elif opcode in _GETS:
            self.stack.append(self.memo[int(argument)])
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        else:
            raise RefusedError(f"its pickle contains the opcode {opcode}, which builds objects")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark instead of a value")
        return value

    def pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise ValueError("no mark on the stack")

    def push_tuple(self, length: int) -> None:
        items = [self.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(items)))

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a global whose name is not a string")
        wanted = Global(module, name)
        if wanted not in self.calls:
            raise RefusedError(
                f"its pickle asks for {one_line(wanted)}, which weights do not need; "
                "no code was run"
            )
        self.stack.append(wanted)

    def instance(self, argument: str) -> None:
        self.name(*argument.split(" ", 1))
        raise RefusedError(f"its pickle builds an instance of {one_line(argument)}")

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        call = self.calls.get(function) if isinstance(function, Global) else None
        if call is None:
            raise RefusedError("its pickle calls something that is not a function")
        self.stack.append(call(*arguments))

    def build(self) -> None:
        self.pop()  # attributes of a state dict, e.g. PyTorch's versions of modules
        if not isinstance(self.stack[-1], dict):
            raise RefusedError("its pickle sets the state of an object")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items appended to something that is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("items set in something that is not a dictionary")
        target.update(_dictionary(items))

    def resolve(self) -> None:
        if self.persistent is None:
            raise ValueError("unexpected persistent identifier")
        self.stack.append(self.persistent(self.pop()))


def _dictionary(items: list[Any]) -> dict[Any, Any]:
    found = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a nested tuple of a hostile file may never end.
        if not isinstance(key, (str, int, float, bytes, type(None))):
            raise ValueError(f"a dictionary key of type {type(key).__name__}")
        found[key] = value
    return found


_LITERALS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_IGNORED = frozenset({"PROTO", "FRAME"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "LIST": lambda m, _: m.stack.append(m.pop_to_mark()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_to_mark()),
    "DICT": lambda m, _: m.stack.append(_dictionary(m.pop_to_mark())),
    "SETITEM": lambda m, _: m.set_items([m.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "GLOBAL": lambda m, argument: m.name(*argument.split(" ", 1)),
    "INST": lambda m, argument: m.instance(argument),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.resolve(),
}

_CALLS: Calls = {
    Global("collections", "OrderedDict"): lambda: {},
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **dict.fromkeys(Global("torch", name) for name in _STORAGES),
}
