"""What follows from an expression alone: its names, its shapes and its cost."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from repvgg_jax.reparam.terms import (
    AvgPool,
    Chain,
    Conv,
    Filter,
    Linear,
    Norm,
    SameShape,
    Scale,
    Sum,
)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything that fixes the shapes of a block.

    Attributes:
      in_channels: channels of the input.
      features: channels of the output.
      stride: spatial stride.
      dilation: dilation of kernels larger than 1x1.
      groups: channel groups.
      same_shape: whether the terms in `SameShape` exist. None decides it from the shapes: True if
        input and output channels are equal and the stride is 1.
    """

    in_channels: int
    features: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    same_shape: bool | None = None

    @property
    def has_same_shape(self) -> bool:
        """Whether the terms in `SameShape` exist."""
        if self.same_shape is None:
            return self.in_channels == self.features and self.stride == 1
        return self.same_shape


class Leaf(NamedTuple):
    """One array of an expression.

    Attributes:
      collection: `params` or `batch_stats`.
      name: the child that it belongs to, the name of a term.
      leaf: `kernel`, `bias`, `scale`, `mean` or `var`.
      shape: its shape.
    """

    collection: str
    name: str
    leaf: str
    shape: tuple[int, ...]


# What an expression is made of.


def subterms(term: Linear) -> tuple[Linear, ...]:
    """The terms directly inside a term."""
    if isinstance(term, (Chain, Sum)):
        return term.terms
    return (term.term,) if isinstance(term, SameShape) else ()


def walk(term: Linear) -> Iterator[Linear]:
    """A term and all terms inside it, in order."""
    yield term
    for child in subterms(term):
        yield from walk(child)


def names(term: Linear, *, optional: bool | None = None) -> frozenset[str]:
    """Names of the children in the parameter tree.

    Args:
      term: the expression.
      optional: True for those inside `SameShape`, False for the others, None for all.
    """
    if isinstance(term, SameShape):
        return frozenset() if optional is False else names(term.term)
    if isinstance(term, (Conv, Norm, Scale)):
        return frozenset() if optional or term.name is None else frozenset({term.name})
    return frozenset().union(*(names(child, optional=optional) for child in subterms(term)))


def present(term: Linear, same_shape: bool) -> Linear | None:
    """The expression without `SameShape`: its terms are part of it or left out.

    Returns:
      The expression, or None where nothing is left of it.
    """
    if isinstance(term, SameShape):
        return present(term.term, same_shape) if same_shape else None
    if isinstance(term, (Chain, Sum)):
        kept = [present(child, same_shape) for child in term.terms]
        left = tuple(child for child in kept if child is not None)
        return type(term)(left) if left else None
    return term


def without_initial(term: Linear) -> Linear:
    """The same expression, whatever its parameters start with."""
    if isinstance(term, SameShape):
        return SameShape(without_initial(term.term))
    if isinstance(term, (Chain, Sum)):
        return type(term)(tuple(without_initial(child) for child in term.terms))
    if isinstance(term, Conv):
        return dataclasses.replace(term, initial="torch")
    if isinstance(term, Norm):
        return dataclasses.replace(term, initial=1.0)
    return dataclasses.replace(term, initial=1.0, spread=0.0) if isinstance(term, Scale) else term


def kernel_size(term: Linear) -> tuple[int, int]:
    """Height and width of the kernel that `affine` gives, of an expression with all its terms."""
    if isinstance(term, Conv):
        height, width = ((size - 1) * term.dilation + 1 for size in term.kernel_size)
        return height, width
    if isinstance(term, (AvgPool, Filter)):
        return term.kernel_size
    sizes = [kernel_size(child) for child in subterms(term)] or [(1, 1)]
    if isinstance(term, Chain):
        return sum(h - 1 for h, _ in sizes) + 1, sum(w - 1 for _, w in sizes) + 1
    return max(h for h, _ in sizes), max(w for _, w in sizes)


def leaves(term: Linear, geometry: Geometry) -> tuple[Leaf, ...]:
    """Names and shapes of all arrays of an expression, in order.

    Args:
      term: the expression.
      geometry: of the block.
    """
    found: list[Leaf] = []

    def collect(part: Linear, in_channels: int, out_channels: int, _: int) -> None:
        found.extend(_own_leaves(part, in_channels, out_channels, geometry.groups))

    visit(term, geometry, collect)
    return tuple(found)


def macs(term: Linear, geometry: Geometry, height: int, width: int) -> int:
    """Multiply-accumulates of the convolutions of an expression, per image.

    Args:
      term: the expression.
      geometry: of the block.
      height: of the input, in pixels.
      width: of the input, in pixels.
    """
    total = 0

    def count(part: Linear, in_channels: int, out_channels: int, stride: int) -> None:
        nonlocal total
        if isinstance(part, (Conv, Filter)):
            groups = (
                part.groups_of(in_channels, geometry.groups)
                if isinstance(part, Conv)
                else in_channels
            )
            pixels = (-(-height // stride)) * (-(-width // stride))
            taps = part.kernel_size[0] * part.kernel_size[1]
            total += taps * in_channels // groups * out_channels * pixels

    visit(term, geometry, count)
    return total


def visit(term: Linear, geometry: Geometry, call: Callable[[Linear, int, int, int], None]) -> None:
    """Calls `call` with every term, its channels in and out and the stride behind it.

    Args:
      term: the expression.
      geometry: of the block.
      call: takes a term, its channels in, its channels out, and the stride behind it.

    Raises:
      ValueError: the terms do not fit together or do not give the block's shape.
    """

    def follow(part: Linear, channels: int, stride: int) -> tuple[int, int]:
        if isinstance(part, Sum):
            ends = [follow(child, channels, stride) for child in part.terms]
            if len(set(ends)) > 1:
                listed = ", ".join(f"{c} channels at stride {s}" for c, s in ends)
                raise ValueError(f"the terms of a sum differ in shape: {listed}")
            return ends[0]
        if isinstance(part, Chain):
            for child in part.terms:
                channels, stride = follow(child, channels, stride)
            return channels, stride
        out = channels
        if isinstance(part, Conv):
            out = part.out_channels(channels, geometry.features)
            groups = part.groups_of(channels, geometry.groups)
            if groups % geometry.groups:
                raise ValueError(
                    f"{part.name} has {groups} groups, not a multiple of the block's "
                    f"{geometry.groups}, so that its deploy form would mix the block's groups"
                )
            if channels % groups or out % groups:
                raise ValueError(
                    f"{part.name} cannot have {channels} -> {out} channels in {groups} groups, "
                    "which must divide both"
                )
        if isinstance(part, (Conv, AvgPool, Filter)) and part.strided:
            stride *= geometry.stride
        call(part, channels, out, stride)
        return out, stride

    resolved = present(term, geometry.has_same_shape)
    if resolved is None:
        raise ValueError("nothing is left of the expression without the terms in SameShape")
    end = follow(resolved, geometry.in_channels, 1)
    if end != (geometry.features, geometry.stride):
        raise ValueError(
            f"the expression gives {end[0]} channels at stride {end[1]}, but the block has "
            f"{geometry.features} at stride {geometry.stride}"
        )


def _own_leaves(
    term: Linear, in_channels: int, out_channels: int, block_groups: int
) -> Iterator[Leaf]:
    if isinstance(term, Conv):
        groups = term.groups_of(in_channels, block_groups)
        shape = (*term.kernel_size, in_channels // groups, out_channels)
        yield Leaf("params", term.name, "kernel", shape)
        if term.bias:
            yield Leaf("params", term.name, "bias", (out_channels,))
    elif isinstance(term, Norm):
        for leaf in ("scale", "bias"):
            yield Leaf("params", term.name, leaf, (in_channels,))
        for leaf in ("mean", "var"):
            yield Leaf("batch_stats", term.name, leaf, (in_channels,))
    elif isinstance(term, Scale) and term.name is not None:
        yield Leaf("params", term.name, "scale", (in_channels,))
        if term.bias:
            yield Leaf("params", term.name, "bias", (in_channels,))
