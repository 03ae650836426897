"""Blocks that installed packages name in their entry points, and how files refer to them.

In the `pyproject.toml` of such a package, for example:

    [project.entry-points."repvgg_jax.blocks"]
    crossed = "my_package.blocks:CROSS"

A file cannot contain such a block, but it records which package it was of and a digest of its
layers, so that another version of the package is noticed if its network is another one.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Literal, Self

from repvgg_jax.reparam import BlockSpec
from repvgg_jax.reparam.linear import without_initial
from repvgg_jax.text import did_you_mean, one_line

Block = BlockSpec | Callable[[Any], BlockSpec | tuple[Any, ...]]
"""What `Variant.block` may be, apart from names."""

Form = Literal["train", "deploy"]
"""Of the network that a file describes."""

ENTRY_POINTS = "repvgg_jax.blocks"
"""The group of entry points in which packages name blocks."""


@functools.cache
def installed(name: str, known: tuple[str, ...] = ()) -> Block:
    """The block that an installed package names.

    Args:
      name: of the entry point.
      known: other names, for messages.

    Raises:
      ValueError: there is none, there are several, or it cannot be imported.
    """
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    found = [point for point in points if point.name == name]
    if not found:
        known = (*known, *(point.name for point in points))
        raise ValueError(
            f"unknown block {one_line(name, 60)!r}; {did_you_mean(name, known)}install the package "
            f"that names it as an entry point of {ENTRY_POINTS}, or choose from {', '.join(known)}"
        )
    where = [f"{point.value} of {_package(point)[0]}" for point in found]
    if len(found) > 1:
        raise ValueError(f"block {name!r} is {' and '.join(where)}; uninstall all but one")
    try:
        block = found[0].load()
    except (Exception, SystemExit) as error:  # whatever the package does when it is imported
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"block {name!r}, {where[0]}, cannot be imported: {reason}") from error
    if not callable(block) and not isinstance(block, BlockSpec):
        raise ValueError(
            f"block {name!r}, {where[0]}, is a {type(block).__name__}; it has to be a BlockSpec or "
            "a function of a Layer"
        )
    return block


@dataclasses.dataclass(frozen=True)
class SavedBlock:
    """What a file records of an installed block.

    Attributes:
      name: of the entry point.
      package: that named it.
      version: of the package.
      layers: SHA-256 of what the block made of every layer, see `layers_digest`.
      form: of the network in the file.
    """

    name: str
    package: str
    version: str
    layers: str
    form: Form = "train"

    @classmethod
    def of(cls, name: str, layers: Iterable[Any], form: Form) -> Self:
        """What to record of the block of that name, which made these layers."""
        package, version = _owner(name) or ("", "")
        return cls(name, package, version, layers_digest(layers, form), form)

    def check_installed(self) -> None:
        """Checks that some package names the block.

        Raises:
          ValueError: none does; the message says which one did.
        """
        if _owner(self.name) is None:
            raise ValueError(
                f"block {one_line(self.name, 60)!r} is of {self._saved_with}, which is not "
                "installed; install it"
            )

    def check(self, layers: Iterable[Any]) -> None:
        """Checks that the installed block makes the same layers as the one that was saved.

        Raises:
          ValueError: it makes other ones.
        """
        if layers_digest(layers, self.form) != self.layers:
            package, version = _owner(self.name) or ("", "")
            raise ValueError(
                f"block {self.name!r} of {package} {version} gives other layers than that of "
                f"{self._saved_with}, with which this was saved; install "
                f"{self._saved_with if version != self.version else 'the package as it was'}"
            )

    @property
    def _saved_with(self) -> str:
        return one_line(f"{self.package} {self.version}", 80)


def layers_digest(layers: Iterable[Any], form: Form) -> str:
    """The SHA-256 of what layers compute; what only initializes parameters does not count.

    Args:
      layers: `repvgg_jax.Layer`s.
      form: "deploy" leaves out everything that the deploy form does not depend on, such as the
        branches of a block.
    """
    plain = [_trained(layer) if form == "train" else _deployed(layer) for layer in layers]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _trained(layer: Any) -> Any:
    block: BlockSpec = layer.block
    fields = _fields(layer, leave_out=("block",))
    return fields | {
        "train": _plain(without_initial(block.train)),
        "deploy": block.deploy,
        "keep": sorted(block.keep),
    }


def _deployed(layer: Any) -> Any:
    block: BlockSpec = layer.block
    fields = _fields(layer, leave_out=("block", "identity"))
    size = _plain(block.kernel_size(layer.geometry()))
    return fields | {"kernel_size": size, "deploy": block.deploy, "keep": sorted(block.keep)}


def _fields(value: Any, *, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a dataclass; those that have their default are left out.

    A field that a later version of this package adds does not change the digest.
    """
    found = {}
    for field in dataclasses.fields(value):
        own, default = getattr(value, field.name), field.default
        if field.name not in leave_out and (type(own) is not type(default) or own != default):
            found[field.name] = _plain(own)
    return found


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__name__, **_fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (Set, tuple, list)):
        items = [_plain(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, Set) else items
    if hasattr(value, "tolist"):  # of NumPy
        return value.tolist()
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    return value


def _owner(name: str) -> tuple[str, str] | None:
    """Name and version of the package that names a block; None if none does."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return next((_package(point) for point in points if point.name == name), None)


def _package(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("an unknown package", "")
