"""Words for messages: suggestions, short lists, tree paths, packages."""

import difflib
import importlib.metadata
import operator
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from repvgg_jax._version import __version__


def did_you_mean(name: str, choices: Iterable[str], *, cutoff: float = 0.5) -> str:
    """`"did you mean 'B1g4'? "` if a choice is close to `name`, else the empty string.

    The comparison ignores case. At most two choices are named.
    """
    lowered = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), lowered, n=2, cutoff=cutoff)
    if not close:
        return ""
    return f"did you mean {' or '.join(repr(lowered[key]) for key in close)}? "


def how_to_install(*, extra: str) -> str:
    """The command that installs the packages of an extra.

    From a checkout that is the list of requirements beside the package; the package is on no
    index, so otherwise it is the extra, to be installed from a checkout.
    """
    whole = extra in ("train", "export")  # the requirements of the scripts
    name = "requirements.txt" if whole else f"requirements-{extra}.txt"
    if (pathlib.Path(__file__).parents[1] / name).is_file():
        return f"pip install -r {name}"
    return f'pip install ".[{extra}]" in a checkout of repvgg_jax'


def encodable(text: str) -> str:
    r"""`text` as UTF-8 can hold it: bytes of a file name that are not become `\udce9`.

    In a JSON text that is an escape, which stands for the same name.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: object, length: int = 160) -> str:
    """`text` on a single line of at most `length` characters."""
    line = encodable(" ".join(str(text).split()))
    return line if len(line) <= length else f"{line[:length]} …"


def first_few(items: Iterable[Any], limit: int = 5) -> str:
    """The first `limit` items, comma-separated, then e.g. `and 12 more`."""
    names = [one_line(item, 120) for item in items]
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def plural(count: int, noun: str) -> str:
    """`1 image`, `1,000 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def tree_path(path: Sequence[Any]) -> str:
    """A path of mapping keys or of JAX's key entries as `stage1_block0/reparam/kernel`."""
    parts = [
        part
        if isinstance(part, (str, int))
        else jax.tree_util.keystr((part,), simple=True, separator="/")
        for part in path
    ]
    return "/".join(str(part) for part in parts)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by `tree_path`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tree_path(path): leaf for path, leaf in leaves}


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package and of those named, as far as they are installed."""
    found = {"repvgg_jax": __version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            # An import name need not be the distribution's, e.g. tensorflow of tensorflow-cpu.
            module = sys.modules.get(package)
            if version := getattr(module, "__version__", None):
                found[package] = version
    return found


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """What differs between two nested mappings, one line per key."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            missing = object()
            a, b = old.get(key, missing), new.get(key, missing)
            if a is missing or b is missing:
                lines.append(f"{path}.{key}: {'added' if a is missing else 'removed'}")
            else:
                lines += differences(a, b, f"{path}.{key}")
        return lines
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def positive_integer(where: str, name: str, value: Any) -> int:
    """An integer of any library as Python's.

    Raises:
      ValueError: it is not an integer, or is below 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{where}: {name}={one_line(repr(value), 40)} must be a positive integer")
    return number
