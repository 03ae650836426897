"""The state dict in whatever a training program saved, and what lies beside it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from repvgg_jax.text import first_few, one_line
from repvgg_jax.weights.tensor import Shapes, Tensor, describe
from repvgg_jax.weights.unpickle import Placeholder

WRAPPERS = ("state_dict", "model", "ema")
"""Keys under which training programs save the state dict; others are found by what they hold."""

_MAX_NESTING = 4
_MAX_MAPPINGS = 1000  # of a file that are looked into
_MAX_KEYS = 20_000  # of a state dict; that of a detector has a few thousand
_MAX_ALL_KEYS = 100_000  # of the mappings that are looked into


class StateDict(NamedTuple):
    """Arrays by their keys.

    Attributes:
      tensors: the arrays.
      others: what else is under its keys, in words.
      beside: keys of what was saved next to it.
    """

    tensors: dict[str, Tensor]
    others: dict[str, str]
    beside: tuple[str, ...]

    @property
    def shapes(self) -> Shapes:
        """Shapes of the arrays, by key."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}


def find_state_dict(
    saved: Any, entry: str | None, has_blocks: Callable[[Shapes], bool]
) -> StateDict:
    """Finds the one mapping that holds a network.

    Args:
      saved: a state dict, or nested mappings with one at any depth up to four.
      entry: the key, or the keys joined by slashes, of the one to take; or the prefix of its
        keys, e.g. `teacher.`.
      has_blocks: whether arrays of these shapes are those of a network.

    Raises:
      ValueError: there is none, or several.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"contains {_words(saved)}, expected a mapping of arrays{_advice(saved)}")
    nested = dict(_nested(saved))
    found = {}
    keys = 0
    for path, mapping in nested.items():
        keys += len(mapping)
        if len(mapping) > _MAX_KEYS or keys > _MAX_ALL_KEYS:
            continue
        state = _state_dict(mapping)
        if state.tensors and has_blocks(state.shapes):
            found[path] = state
    if entry is not None:
        return _chosen(saved, nested, found, entry)
    if len(found) > 1:
        names = ["/".join(path) or "the top" for path in found]
        raise ValueError(
            f"contains weights under {' and '.join(names)}; choose with "
            f"entry={next(filter(None, map('/'.join, found)))!r}"
        )
    path = next(iter(found)) if found else _wrapped(saved)
    return _checked(nested[path])._replace(beside=_beside(saved, path))


def _chosen(
    saved: Mapping[Any, Any],
    nested: Mapping[tuple[str, ...], Mapping[Any, Any]],
    found: Mapping[tuple[str, ...], StateDict],
    entry: str,
) -> StateDict:
    wanted = tuple(entry.split("/"))
    for paths in (found, nested):  # networks first, other mappings for what is wrong with them
        inside = [path for path in paths if path[: len(wanted)] == wanted]
        if inside:
            return _checked(nested[inside[0]])._replace(beside=_beside(saved, inside[0]))
    for path, state in found.items():
        chosen = {key: array for key, array in state.tensors.items() if key.startswith(entry)}
        if chosen and entry.endswith("."):
            rest = tuple(key for key in state.tensors if key not in chosen)
            return StateDict(chosen, state.others, (*_beside(saved, path), *rest))
    raise ValueError(f"no mapping {entry!r}; the keys are {first_few(saved)}")


def _nested(
    saved: Mapping[Any, Any],
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Mappings in mappings by their paths, each once, the outer ones first."""
    seen = {id(saved)}
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), saved)]
    for _ in range(_MAX_NESTING + 1):
        yield from level
        inner = []
        for path, mapping in level:
            for key, value in mapping.items():
                if isinstance(value, Mapping) and isinstance(key, str) and id(value) not in seen:
                    seen.add(id(value))
                    inner.append(((*path, key), value))
                if len(seen) > _MAX_MAPPINGS:
                    break
        level = inner


def _wrapped(saved: Mapping[Any, Any]) -> tuple[str, ...]:
    """Where a state dict would be, for what is wrong with it."""
    path: tuple[str, ...] = ()
    for _ in range(_MAX_NESTING):
        inner = [key for key in WRAPPERS if isinstance(saved.get(key), Mapping)]
        if not inner:
            break
        path, saved = (*path, inner[0]), saved[inner[0]]
    return path


def _state_dict(mapping: Mapping[Any, Any]) -> StateDict:
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    for key, value in mapping.items():
        tensor = describe(value)
        if tensor is not None and isinstance(key, str):
            tensors[key] = tensor
        else:
            others[str(key)] = _words(value)
    return StateDict(tensors, others, ())


def _checked(mapping: Mapping[Any, Any]) -> StateDict:
    if len(mapping) > _MAX_KEYS:
        raise ValueError(f"a state dict of {len(mapping):,} keys, at most {_MAX_KEYS:,}")
    state = _state_dict(mapping)
    if not state.tensors:
        raise ValueError(
            f"contains no arrays; the keys are {first_few(_with_kinds(state.others)) or 'none'}"
            + next(filter(None, map(_advice, mapping.values())), "")
        )
    return state


def _beside(saved: Mapping[Any, Any], path: tuple[str, ...]) -> tuple[str, ...]:
    """Keys on the way to a mapping that do not lead to it."""
    found: list[str] = []
    for step in path:
        others = {str(key): _words(value) for key, value in saved.items() if key != step}
        found += _with_kinds(others)
        saved = saved[step]
    return tuple(found)


def _with_kinds(others: Mapping[str, str]) -> list[str]:
    return [f"{key} ({kind})" for key, kind in others.items()]


def _words(value: Any) -> str:
    if isinstance(value, Placeholder):
        return f"a pickled {one_line(value.kind)}"
    return f"a {type(value).__name__}" if not isinstance(value, Tensor) else "a tensor"


def _advice(value: Any) -> str:
    """What to do about a pickled object where weights should be."""
    if not isinstance(value, Placeholder):
        return ""
    return "; nothing in the file was run: where it was written, save model.state_dict() instead"
