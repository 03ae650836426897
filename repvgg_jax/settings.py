"""Settings as frozen dataclasses that check themselves.

A setting is one field of a section, with its default, its meaning and its limits:

    @dataclasses.dataclass(frozen=True)
    class EvalSettings(Section, path="config.eval"):
        every_epochs: int = setting(1, "epochs between two evaluations", least=1)

`Section.from_mapping` builds a section from nested plain mappings and `Section.plain` gives them
back. All errors name the setting as the command line does, e.g. `config.eval.every_epochs`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

from repvgg_jax.text import did_you_mean, first_few


@dataclasses.dataclass(frozen=True)
class Limits:
    """The values that a setting may have.

    Attributes:
      least: smallest value, inclusive.
      above: smallest value, exclusive.
      most: largest value, inclusive.
      below: largest value, exclusive.
      choices: the only values.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()

    def allow(self, value: Any) -> bool:
        """Whether a value is within the limits."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (not self.choices or value in self.choices)
        )

    def __str__(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        if self.least is not None and self.below is not None:
            return f"in [{self.least}, {self.below})"
        low = f"above {self.above}" if self.above is not None else ""
        low = f"{self.least} or more" if self.least is not None else low
        high = f"at most {self.most}" if self.most is not None else ""
        return " and ".join(filter(None, (low, high)))


def setting(
    default: Any,
    doc: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] = (),
    parse: Callable[[str, Any], Any] | None = None,
    plain: Callable[[Any], Any] | None = None,
    any_type: bool = False,
) -> Any:
    """A field of a `Section`.

    A setting that is added to a section later must have a default that reproduces what runs did
    before: it is what their `config.json` is read with.

    Args:
      default: value; its type is the type of the setting. Lists are read as tuples, integers
        as floats if the default is one.
      doc: what the setting is, with its unit.
      least: smallest value, inclusive.
      above: smallest value, exclusive.
      most: largest value, inclusive.
      below: largest value, exclusive.
      choices: the only values.
      parse: `parse(name, value)` converts the plain value in a configuration, if the setting
        holds something else; raises ValueError.
      plain: the inverse of `parse`.
      any_type: the plain value may be of any type, so that a configuration must not insist on
        that of the default.
    """
    limits = Limits(least, above, most, below, choices)
    metadata = {"doc": doc, "limits": limits, "parse": parse, "plain": plain}
    metadata["any_type"] = any_type
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base of frozen dataclasses whose fields are settings or other sections.

    Attributes:
      path: name of the section in messages and on the command line, e.g. `config.train`.
    """

    path: ClassVar[str]

    def __init_subclass__(cls, path: str) -> None:
        cls.path = path

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if isinstance(field.default, Section):
                continue
            name, value = f"{self.path}.{field.name}", getattr(self, field.name)
            if field.metadata["parse"] is None:
                value = _typed(name, value, field.default)
            _check(name, value, field.metadata["limits"])
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Checks how the settings of this section relate to each other.

        Raises:
          ValueError: two settings that exclude each other.
        """

    @classmethod
    def from_mapping(cls, content: Any) -> Self:
        """Builds the section from plain values; settings that are missing take their defaults.

        Args:
          content: values by name, nested as the sections are.

        Raises:
          ValueError: an unknown setting, or a value that is not allowed.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{cls.path} must be a mapping from names to values, not {content!r}")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := [str(name) for name in content if name not in fields]:
            raise ValueError(
                f"unknown setting {first_few(f'{cls.path}.{name}' for name in unknown)}; "
                f"{did_you_mean(unknown[0], fields)}{cls.path} has: {', '.join(fields)}"
            )
        values = {}
        for name, value in content.items():
            default, parse = fields[name].default, fields[name].metadata.get("parse")
            if isinstance(default, Section):
                value = type(default).from_mapping(value)
            elif parse is not None:
                value = parse(f"{cls.path}.{name}", value)
            values[name] = value
        try:
            return cls(**values)
        except TypeError as error:  # of a comparison with a value in a list
            raise ValueError(f"{cls.path} has a value of a wrong type: {error}") from error

    def plain(self) -> dict[str, Any]:
        """The settings as nested dictionaries of plain values; tuples stay tuples."""
        content = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, plain = getattr(self, field.name), field.metadata.get("plain")
            if isinstance(value, Section):
                value = value.plain()
            content[field.name] = value if plain is None else plain(value)
        return content


def as_json(value: Any) -> Any:
    """Plain values as JSON returns them: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_tuples(value: Any) -> Any:
    """The inverse of `as_json`: lists become tuples."""
    if isinstance(value, Mapping):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _typed(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`; raises ValueError if it is another one."""
    kind = type(default)
    if kind is tuple and isinstance(value, (list, tuple)):
        return as_tuples(value)
    if kind is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r} must be of type {kind.__name__}, as {default!r} is")
    return value


def _check(name: str, value: Any, limits: Limits) -> None:
    for number in _numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name}={number} must be a finite number")
        if abs(number) > 2**1000:
            raise ValueError(f"{name} is too large a number")
    if value is not None and not limits.allow(value):
        if limits.choices:
            hint = did_you_mean(value, limits.choices) if isinstance(value, str) else ""
            raise ValueError(f"{name}={value!r}; {hint}there are: {', '.join(limits.choices)}")
        raise ValueError(f"{name}={value} must be {limits}")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a value, those in nested tuples too."""
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value
