"""A pickle reader that can build containers, numbers and text, and call a few given functions.

Python's own unpickler imports and calls whatever a file names, so a checkpoint can run code.
This one never imports anything: a file's global is a pair of words, and unless the caller
listed that pair the file is refused by name. It allocates nothing beyond what the file really
contains, whatever lengths and indices its opcodes claim. `pickletools` of the standard
library splits the file into opcodes.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

from repvgg_jax.weights.wording import brief


class Global(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


Calls = Mapping[Global, Callable[..., Any] | None]
"""What a file may name: a function to call, or None for a name that only stands for itself.

To keep memory in proportion to the file, a function must not copy what it is given: a file
can refer to one long list many times.
"""


def unpickle(
    stream: IO[bytes], calls: Calls, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Reads one pickle; the stream is left behind its last byte.

    Args:
      stream: has `read`, `readline` and `tell`.
      calls: the globals that the pickle may name.
      persistent: turns a persistent identifier into what it stands for.

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
        # Opcodes in an order that no pickler writes end in any of these.
        raise ValueError(f"damaged pickle: {brief(error)}") from error
    raise ValueError("damaged pickle: it ends before its STOP")


class RefusedError(ValueError):
    """A pickle asked for something that reading weights does not need."""


_MARK = object()


class _Machine:
    """The stack and the memo that a pickle's opcodes work on."""

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
            raise RefusedError(f"its pickle holds the instruction {opcode}, which builds objects")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
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
            raise ValueError("a global whose name is no text")
        wanted = Global(module, name)
        if wanted not in self.calls:
            raise RefusedError(
                f"its pickle asks for {brief(wanted)}, and reading weights needs no such thing; "
                "nothing of it was run"
            )
        self.stack.append(wanted)

    def instance(self, argument: str) -> None:
        self.name(*argument.split(" ", 1))
        raise RefusedError(f"its pickle builds an instance of {brief(argument)}")

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        call = self.calls.get(function) if isinstance(function, Global) else None
        if call is None:
            raise RefusedError("its pickle calls something that is no function")
        self.stack.append(call(*arguments))

    def build(self) -> None:
        self.pop()  # attributes of a state dict, such as PyTorch's version numbers of modules
        if not isinstance(self.stack[-1], dict):
            raise RefusedError("its pickle sets the state of an object")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items appended to something that is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("items set in something that is no dictionary")
        target.update(_dictionary(items))

    def resolve(self) -> None:
        if self.persistent is None:
            raise ValueError("a persistent identifier where there should be none")
        self.stack.append(self.persistent(self.pop()))


def _dictionary(items: list[Any]) -> dict[Any, Any]:
    found = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Plain keys only: to hash a nested tuple from a hostile file may never end.
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
