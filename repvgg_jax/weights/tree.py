"""Every array of a RepVGG in this project's parameter tree: path, shape and kind.

Derived from `Variant.layers()` and the expressions of their blocks, without building the model.
`repvgg_jax.weights.names` translates this list into the keys and layouts of other projects.
"""

import enum
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from repvgg_jax import reparam
from repvgg_jax.variants import Layer, Variant


class Kind(enum.Enum):
    """What an array is, which decides its layout in PyTorch."""

    CONVOLUTION = "convolution"  # HWIO here, OIHW in PyTorch
    LINEAR = "linear"  # (in, out) here, or (1, 1, in, out) in a block; (out, in) in PyTorch
    GATE = "gate"  # a linear layer of squeeze-and-excite: a 1x1 convolution in PyTorch
    VECTOR = "vector"


class Leaf(NamedTuple):
    """One array.

    Attributes:
      path: keys from the collection down, e.g. `("params", "head", "kernel")`.
      shape: its shape.
      kind: its kind.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind

    @property
    def module(self) -> str:
        """The top-level module that it belongs to: a block, `head` or an `aux_…` head."""
        return self.path[1]

    @property
    def in_head(self) -> bool:
        """Whether it depends on the task: part of the classifier or of an auxiliary one."""
        return in_head(self.path)


def in_head(path: tuple[str, ...]) -> bool:
    """Whether the array at `path` depends on the task."""
    return path[1] == "head" or path[1].startswith("aux_")


def is_classifier(path: tuple[str, ...]) -> bool:
    """Whether the last axis of the array at `path` is that of the classes."""
    return in_head(path) and path[-2] in ("head", "head_dist", "reparam", "logits")


def head_width(arrays: Mapping[tuple[str, ...], Any]) -> int:
    """Classes of the classifier among arrays by path; 0 without one."""
    own = (a for path, a in arrays.items() if path[1] == "head" and is_classifier(path))
    return next((array.shape[-1] for array in own), 0)


def leaves(
    variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
) -> tuple[Leaf, ...]:
    """All arrays of a variant's variables.

    Args:
      variant: the architecture.
      deploy: the fused form instead of the training form.
      num_classes: width of the classifiers; 0 for none.
      in_channels: channels of the images.
    """
    found: list[Leaf] = []
    for layer in variant.layers():
        found += _block_leaves(layer, deploy, in_channels)
    if head := variant.head_layer(num_classes):
        found += _block_leaves(head, deploy, in_channels, kind=Kind.LINEAR)
    elif num_classes:
        found += _linear(("head",), variant.features, num_classes, Kind.LINEAR)
    if num_classes:
        for layer in variant.layers():
            if layer.name in variant.auxiliary and not deploy:
                found += _auxiliary(f"aux_{layer.name}", layer.features, num_classes)
    return tuple(found)


def _block_leaves(
    layer: Layer, deploy: bool, in_channels: int, *, kind: Kind = Kind.CONVOLUTION
) -> Iterator[Leaf]:
    block, geometry = layer.block, layer.geometry(in_channels)
    fused = reparam.Conv(block.deploy, block.kernel_size(geometry), bias=True)
    for leaf in reparam.leaves(fused if deploy else block.train, geometry):
        own = kind if leaf.leaf == "kernel" else Kind.VECTOR
        yield Leaf((leaf.collection, layer.name, leaf.name, leaf.leaf), leaf.shape, own)
    if layer.se is not None:
        width, squeezed = layer.features, layer.se.squeezed(layer.features)
        yield from _linear((layer.name, "se", "reduce"), width, squeezed, Kind.GATE)
        yield from _linear((layer.name, "se", "expand"), squeezed, width, Kind.GATE)


def _auxiliary(head: str, width: int, num_classes: int) -> Iterator[Leaf]:
    yield Leaf(("params", head, "conv", "kernel"), (3, 3, width, width), Kind.CONVOLUTION)
    for collection, name in _NORM:
        yield Leaf((collection, head, "bn", name), (width,), Kind.VECTOR)
    yield from _linear((head, "logits"), width, num_classes, Kind.LINEAR)


def _linear(module: tuple[str, ...], inputs: int, outputs: int, kind: Kind) -> Iterator[Leaf]:
    yield Leaf(("params", *module, "kernel"), (inputs, outputs), kind)
    yield Leaf(("params", *module, "bias"), (outputs,), Kind.VECTOR)


_NORM = (
    ("params", "scale"),
    ("params", "bias"),
    ("batch_stats", "mean"),
    ("batch_stats", "var"),
)
