"""Pickles, read without importing or calling anything that they name.

Python's own unpickler imports and calls whatever a file names, so a checkpoint can run code.
Here a global is a pair of words. The caller lists the few that mean something (a tensor, an
ordered dictionary); every other one, and whatever a file does with it, becomes a `Placeholder`,
which remembers the name and nothing else. `pickletools` of the standard library splits the file
into opcodes.

A file can ask for far more time and memory than its size suggests. So the number of opcodes, the
processor time and the size of the pickle are limited, and keys and
indices that could collide in a dictionary are refused.
"""

import pickletools
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

from repvgg_jax.text import one_line

MAX_OPCODES = 1_000_000
"""A detector with its optimizer and its log needs a tenth."""

MAX_SIZE = 48 << 20
"""Bytes of a pickle, which holds no tensor."""

MAX_NAME = 256
"""Characters of a key or of half a global's name: long ones take long to compare."""

MAX_SECONDS = 1.5
"""Processor time of this thread."""

_MAX_CALLS = 200_000  # two per tensor
_MAX_ARGUMENTS = 16
_MAX_KEY_BITS = 60  # integers up to here are their own hash
_MAX_INDEX = 1 << 32  # of the memo
_MAX_KINDS = 1000  # of placeholders
_CLOCK_EVERY = 2048  # opcodes


class Global(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Placeholder:
    """Something that weights do not need: an object, or what a function would have returned.

    Attributes:
      kind: what the file calls it, e.g. `argparse.Namespace`.
    """

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        """Remembers the name."""
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      value: plain containers, texts and numbers, what the caller's functions made, and
        placeholders.
      placeholders: the kinds of placeholders, each once.
    """

    value: Any
    placeholders: tuple[str, ...]


Calls = Mapping[Global, Callable[..., Any] | None]
"""What means something: a function to call, or None for a name that is only a value.

Functions take time and memory independent of their arguments' sizes: a file can refer to one long
list many times.
"""


def unpickle(
    stream: IO[bytes], calls: Calls, persistent: Callable[[Any], Any] | None = None
) -> Contents:
    """Reads one pickle and leaves the stream at its end.

    Args:
      stream: in memory, at most `MAX_SIZE` bytes: a text in it may become four times as long.
      calls: the globals that mean something.
      persistent: maps a persistent identifier to its object.

    Raises:
      ValueError: the pickle is damaged, or larger or slower than that of any network.
    """
    machine = _Machine(calls, persistent)
    clock = time.thread_time()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name == "STOP":
                return Contents(machine.pop(), tuple(machine.kinds))
            if number >= MAX_OPCODES:
                raise LimitError(f"its pickle has more than {MAX_OPCODES:,} opcodes")
            if not number % _CLOCK_EVERY and time.thread_time() - clock > MAX_SECONDS:
                raise LimitError(f"its pickle takes more than {MAX_SECONDS:g} s to read")
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        if isinstance(error, LimitError):
            raise
        # Opcodes in an order that no pickler writes raise any of these.
        raise ValueError(f"damaged pickle: {one_line(error)}") from error
    raise ValueError("damaged pickle: no STOP")


class LimitError(ValueError):
    """A file that asks for more than the weights of a network need."""


_MARK = object()


class _Machine:
    """The stack and the memo of a pickle's opcodes."""

    def __init__(self, calls: Calls, persistent: Callable[[Any], Any] | None):
        self.calls = calls
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.kinds: dict[str, Placeholder] = {}
        self.called = 0

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _PUTS:
            index = len(self.memo) if argument is None else int(argument)
            if not 0 <= index < _MAX_INDEX:
                raise ValueError("a memo index out of range")
            self.memo[index] = self.stack[-1]
        elif opcode in _GETS:
            self.stack.append(self.memo[int(argument)])
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in _IGNORED:
            raise ValueError(f"the opcode {opcode}")

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

    def placeholder(self, kind: str) -> Placeholder:
        """One per kind: it has no state, and a file may ask for millions."""
        if len(self.kinds) > _MAX_KINDS:
            raise LimitError(f"its pickle names more than {_MAX_KINDS:,} classes and functions")
        return self.kinds.setdefault(kind, Placeholder(kind))

    def push_tuple(self, length: int) -> None:
        items = [self.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(items)))

    def name(self, module: Any, name: Any) -> None:
        """Pushes a global that means something as itself, any other as a placeholder."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a global whose name is not a string")
        if max(len(module), len(name)) > MAX_NAME:
            raise ValueError(f"a global whose name has {max(len(module), len(name))} characters")
        wanted = Global(module, name)
        self.stack.append(wanted if wanted in self.calls else self.placeholder(str(wanted)))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        """A call, made only if the function was listed."""
        arguments, function = self.pop(), self.pop()
        call = self.calls.get(function) if isinstance(function, Global) else None
        if call is None:
            return self.instance(function)
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            raise ValueError(f"invalid arguments of {function}")
        self.called += 1
        if self.called > _MAX_CALLS:
            raise LimitError(f"its pickle has more than {_MAX_CALLS // 2:,} tensors")
        self.stack.append(call(*arguments))

    def instance(self, function: Any) -> None:
        if not isinstance(function, (Global, Placeholder)):
            raise ValueError("a call of something that is not a function")
        kind = function.kind if isinstance(function, Placeholder) else str(function)
        self.stack.append(self.placeholder(kind))

    def new_object(self, arguments: int) -> None:
        for _ in range(arguments):
            self.pop()
        self.instance(self.pop())

    def old_object(self) -> None:
        items = self.pop_to_mark()
        self.instance(items[0])

    def old_instance(self, argument: str) -> None:
        self.pop_to_mark()
        self.name(*argument.split(" ", 1))
        self.instance(self.pop())

    def build(self) -> None:
        """Attributes of an object: dropped, e.g. PyTorch's versions of modules."""
        self.pop()
        if not isinstance(self.stack[-1], (dict, Placeholder)):
            raise ValueError("the state of something that is not an object")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise ValueError("items appended to something that is not a list")

    def add(self) -> None:
        self.pop_to_mark()
        if not isinstance(self.stack[-1], Placeholder):
            raise ValueError("items added to something that is not a set")

    def frozen_set(self) -> None:
        self.pop_to_mark()
        self.stack.append(self.placeholder("builtins.frozenset"))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            self.fill(target, items)
        elif not isinstance(target, Placeholder):
            raise ValueError("items set in something that is not a dictionary")

    def fill(self, target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _is_key(key):
                target[key] = value
            else:  # no key of weights, and hashing it may never end
                self.placeholder(f"a dictionary key of type {type(key).__name__}")
        return target

    def resolve(self, identifier: Any) -> None:
        if self.persistent is None:
            raise ValueError("unexpected persistent identifier")
        self.stack.append(self.persistent(identifier))


def _is_key(key: Any) -> bool:
    """Whether it is quickly hashed and compared, and few others have its hash."""
    if isinstance(key, (str, bytes)):
        return len(key) <= MAX_NAME
    if isinstance(key, int):
        return key.bit_length() <= _MAX_KEY_BITS
    return key is None or isinstance(key, float)


_LITERALS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"}
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
    "DICT": lambda m, _: m.stack.append(m.fill({}, m.pop_to_mark())),
    "SETITEM": lambda m, _: m.set_items([m.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "EMPTY_SET": lambda m, _: m.stack.append(m.placeholder("builtins.set")),
    "ADDITEMS": lambda m, _: m.add(),
    "FROZENSET": lambda m, _: m.frozen_set(),
    "GLOBAL": lambda m, argument: m.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "EXT1": lambda m, argument: m.stack.append(m.placeholder(f"extension {argument}")),
    "EXT2": lambda m, argument: m.stack.append(m.placeholder(f"extension {argument}")),
    "EXT4": lambda m, argument: m.stack.append(m.placeholder(f"extension {argument}")),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new_object(1),
    "NEWOBJ_EX": lambda m, _: m.new_object(2),
    "OBJ": lambda m, _: m.old_object(),
    "INST": lambda m, argument: m.old_instance(argument),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, argument: m.resolve(argument),
    "BINPERSID": lambda m, _: m.resolve(m.pop()),
}
