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
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import numpy as np

from repvgg_jax.reparam import BlockSpec
from repvgg_jax.reparam.linear import visit, without_initial
from repvgg_jax.reparam.terms import Filter, Linear
from repvgg_jax.text import did_you_mean, one_line

Block = BlockSpec | Callable[[Any], BlockSpec | tuple[Any, ...]]
"""What `Variant.block` may be, apart from names."""

Form = Literal["train", "deploy"]
"""Form of the network that a file describes."""

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
            f"block {name!r}, {where[0]}, is of the type {type(block).__name__}; it has to be a "
            "BlockSpec or a function of a Layer"
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
        return cls(name, *(_owner(name) or ("", "")), layers_digest(layers, form), form)

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
            now = _owner(self.name) or ("", "")
            before = "the package as it was" if now[1] == self.version else self._saved_with
            raise ValueError(
                f"block {self.name!r} of {' '.join(now)} gives other layers than that of "
                f"{self._saved_with}, with which this was saved; install {before}"
            )

    def other_version(self) -> str:
        """A remark for messages if another version of the package is installed, else empty."""
        now = _owner(self.name) or ("", "")
        if now == (self.package, self.version):
            return ""
        return f"; this was saved with {self._saved_with}, and {' '.join(now)} is installed"

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
    expression = without_initial(layer.block.train)
    taps = [[f"{tap + 0.0:.6g}" for tap in kernel.flat] for kernel in _filters(layer)]
    return {
        **_fields(layer, leave_out=("block",)),
        "train": _plain(expression),
        "filters": taps,  # rounded, as functions may give other last digits on another machine
        "deploy": layer.block.deploy,
    }


def _deployed(layer: Any) -> Any:
    return {
        **_fields(layer, leave_out=("block", "identity")),
        "kernel_size": layer.block.kernel_size(layer.geometry()),
        "deploy": layer.block.deploy,
    }


def _filters(layer: Any) -> list[np.ndarray]:
    """The constant kernels in a layer's block, in order."""
    found: list[np.ndarray] = []

    def collect(term: Linear, in_channels: int, *_: int) -> None:
        if isinstance(term, Filter):
            found.append(term.kernel(in_channels))

    visit(layer.block.train, layer.geometry(), collect)
    return found


def _fields(value: Any, *, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a dataclass; those that have their default are left out.

    A field that a later version of this package adds does not change the digest.
    """
    found = {}
    for field in dataclasses.fields(value):
        if field.name not in leave_out:
            own, default = _plain(getattr(value, field.name)), field.default
            if default is dataclasses.MISSING or own != _plain(default):
                found[field.name] = own
    return found


def _plain(value: Any) -> Any:
    """A term, or a field of a term or layer, as JSON can hold it."""
    if isinstance(value, Filter):
        return ["Filter", value.kernel_size, value.strided]  # its taps are there as numbers
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, _fields(value)]
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, str) or value is None:
        return value
    return float(value)  # 1, 1.0 and True of any library are the same


def _owner(name: str) -> tuple[str, str] | None:
    """Name and version of the package that names a block; None if none does."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return next((_package(point) for point in points if point.name == name), None)


def _package(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    name, version = (point.dist.name, point.dist.version) if point.dist else (None, None)
    return name or "an unknown package", version or ""
