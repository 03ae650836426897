"""Values of JSON files as typed Python values, so that a damaged file is one clear error."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from repvgg_jax.text import one_line


def typed(kind: Any, value: Any, name: str) -> Any:
    """A value of a JSON file as a value of the type `kind`.

    Lists become tuples, objects dataclasses, and integers floats where these are wanted. The
    metadata of a field of a dataclass may have the key `saved`: its type in files.

    Args:
      kind: `int`, `float`, `str`, `bool`, `None`, `Any`, a literal, a dataclass, or a union, tuple
        or mapping of these.
      value: as `json.loads` returns it.
      name: what messages call the value.

    Raises:
      ValueError: another type, an unknown or a missing field, or what a dataclass refuses.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, name)
    if origin is typing.Literal:
        if any(type(value) is type(known) and value == known for known in arguments):
            return value
        known = ", ".join(map(repr, arguments))
        raise ValueError(f"{name}={one_line(repr(value), 60)} must be one of {known}")
    if origin is tuple and isinstance(value, (list, tuple)):
        return _tuple(arguments, value, name)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _dataclass(kind, value, name)
    if kind is float and type(value) is int:
        return _float(value, name)
    if kind is None or kind is types.NoneType:
        if value is None:
            return None
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{name}={one_line(repr(value), 60)} must be {_words(kind)}")


def _one_of(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    for kind in kinds:
        # An object and a list say which of several types is meant, a scalar does not.
        with_fields = dataclasses.is_dataclass(kind) and isinstance(value, Mapping)
        with_items = typing.get_origin(kind) is tuple and isinstance(value, (list, tuple))
        if with_fields or with_items:
            return typed(kind, value, name)
    for kind in kinds:
        try:
            return typed(kind, value, name)
        except ValueError:
            continue
    words = " or ".join(_words(kind) for kind in kinds)
    raise ValueError(f"{name}={one_line(repr(value), 60)} must be {words}")


def _tuple(kinds: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise ValueError(f"{name} has {len(value)} values, not {len(kinds)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(typed(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(pairs))


def _dataclass(kind: Any, value: Mapping[str, Any], name: str) -> Any:
    fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
    hints |= {field.name: field.metadata["saved"] for field in fields if "saved" in field.metadata}
    wanted = {field.name for field in fields if field.init}
    if unknown := [key for key in value if key not in wanted]:
        raise ValueError(f"{name} has no field {one_line(repr(unknown[0]), 60)}")
    needed = [
        field.name
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing := [key for key in needed if key not in value]:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    return kind(**{key: typed(hints[key], item, f"{name}.{key}") for key, item in value.items()})


def _float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large a number") from error


def _words(kind: Any) -> str:
    if kind is None or kind is types.NoneType:
        return "null"
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) in (dict, Mapping):
        return "an object"
    if typing.get_origin(kind) is tuple:
        return "a list"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, str(kind))
