"""How a project's names and layouts of checkpoints translate to ours.

A `Naming` translates the list of `repvgg_jax.weights.tree.leaves` into a project's keys and
shapes. Readers and writers use the same translation in opposite directions, so whatever is
written is read back bitwise identical. The projects are in `repvgg_jax.weights.names`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from repvgg_jax.variants import Variant
from repvgg_jax.weights.tensor import Shapes
from repvgg_jax.weights.tree import Kind, Leaf, leaves


class Entry(NamedTuple):
    """One array under a project's key.

    Attributes:
      key: the project's key.
      shape: its shape there.
      leaf: the array of our tree; None for PyTorch's `num_batches_tracked`, which has no
        counterpart.
      axes: the transposition from our layout to theirs, up to axes of length 1.
    """

    key: str
    shape: tuple[int, ...]
    leaf: Leaf | None
    axes: tuple[int, ...] = ()

    def from_ours(self, array: np.ndarray) -> np.ndarray:
        """Converts an array of our tree to this layout."""
        return array.transpose(self.axes).reshape(self.shape)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Converts an array of this layout to that of our tree."""
        assert self.leaf is not None
        transposed = tuple(self.leaf.shape[axis] for axis in self.axes)
        return array.reshape(transposed).transpose(np.argsort(self.axes))


class Naming(Protocol):
    """One way to name the arrays of a RepVGG."""

    @property
    def family(self) -> str:
        """The project that uses these names."""

    def covers(self, variant: Variant) -> bool:
        """Whether it has names for all arrays of a variant."""

    def entries(
        self, variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
    ) -> tuple[Entry, ...]:
        """Keys, shapes and layouts of all arrays of a variant that it covers."""

    def prefixes(self, shapes: Shapes, children: Collection[str]) -> Counter[str]:
        """How many blocks' kernels there are, by what precedes the naming's own keys.

        Args:
          shapes: of all arrays, by key.
          children: as in `kernels`.
        """

    def owns(self, key: str) -> bool:
        """Whether a key is that of a block or of the classifier, of whatever architecture."""

    def kernels(self, shapes: Shapes, children: Collection[str]) -> dict[str, tuple[int, int]]:
        """Input and output channels of the blocks' kernels.

        Args:
          shapes: of all arrays, by key.
          children: our names of the children that the kernels belong to, e.g. `se/reduce`.

        Returns:
          By our name of the block, `stem` or `stage1_block0`.
        """

    def num_classes(self, shapes: Shapes) -> int:
        """Width of the classifier; 0 if there is none."""


class FlaxNaming:
    """Our own tree, flattened: paths joined by slashes, shapes and layouts unchanged."""

    family = "flax"

    def covers(self, variant: Variant) -> bool:
        """Always."""
        return True

    def entries(
        self, variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
    ) -> tuple[Entry, ...]:
        """As `Naming.entries`."""
        return tuple(
            Entry("/".join(leaf.path), leaf.shape, leaf, tuple(range(len(leaf.shape))))
            for leaf in leaves(
                variant, deploy=deploy, num_classes=num_classes, in_channels=in_channels
            )
        )

    def prefixes(self, shapes: Shapes, children: Collection[str]) -> Counter[str]:
        """None, as `Naming.prefixes`: the collection comes first."""
        blocks = len(self.kernels(shapes, children))
        return Counter({"": blocks} if blocks else {})

    def owns(self, key: str) -> bool:
        """Always, as `Naming.owns`."""
        return True

    def kernels(self, shapes: Shapes, children: Collection[str]) -> dict[str, tuple[int, int]]:
        """As `Naming.kernels`."""
        child = "|".join(map(re.escape, children))
        pattern = re.compile(
            rf"params/(stem|stem_block\d+|stage\d+_block\d+)/({child})/kernel", re.ASCII
        )
        return {
            match[1]: (shape[-2], shape[-1])
            for key, shape in shapes.items()
            if len(shape) >= 2 and (match := pattern.fullmatch(key))
        }

    def num_classes(self, shapes: Shapes) -> int:
        """As `Naming.num_classes`."""
        heads = ("params/head/bias", "params/head/head/bias", "params/head/reparam/bias")
        return next((length(shapes[key]) for key in heads if key in shapes), 0)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchNaming:
    """A PyTorch project's names and layouts.

    Attributes:
      family: the project.
      stem: prefix of the stem.
      stage: prefix of a container of blocks: `{stage}` counts from 1, `{stage0}` from 0, and
        `{part}` is the half of a stage split in two.
      children: the project's names of a block's children, by ours.
      head: prefix of the classifier.
      plus: whether these are names for RepVGGplus, or for everything else.
    """

    family: str
    stem: str
    stage: str
    children: Mapping[str, str]
    head: str
    plus: bool = False

    def covers(self, variant: Variant) -> bool:
        """As `Naming.covers`."""
        after_relu = variant.se is not None and variant.se.after_relu
        if self.plus != (after_relu or bool(variant.auxiliary)):
            return False
        for block in variant.blocks:
            if not block.required | block.optional <= self.children.keys():
                return False
        splits = (len(_ends(variant, stage)) for stage in range(1, len(variant.depths) + 1))
        return "stem" not in variant.auxiliary and max(splits) <= len(_PARTS)

    def entries(
        self, variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
    ) -> tuple[Entry, ...]:
        """As `Naming.entries`."""
        prefixes = self._prefixes(variant)
        found = leaves(variant, deploy=deploy, num_classes=num_classes, in_channels=in_channels)
        return torch_entries(found, lambda leaf: f"{prefixes[leaf.module]}{self._child(leaf)}")

    def prefixes(self, shapes: Shapes, children: Collection[str]) -> Counter[str]:
        """As `Naming.prefixes`."""
        ends = tuple(f".{self.children[c]}.weight" for c in children if c in self.children)
        block = re.compile(rf"(?:^|\.)({self._blocks})$", re.ASCII)
        found: Counter[str] = Counter()
        for key, shape in shapes.items():
            if len(shape) == 4 and key.endswith(ends):
                end = next(end for end in ends if key.endswith(end))
                if match := block.search(key.removesuffix(end)):
                    found[key[: match.start(1)]] += 1
        return found

    def owns(self, key: str) -> bool:
        """As `Naming.owns`."""
        container = re.escape(self.stage.partition("{")[0])
        modules = rf"({re.escape(self.stem)}|{re.escape(self.head)})\."
        return re.match(rf"{modules}|{container}\d", key, re.ASCII) is not None

    @property
    def _blocks(self) -> str:
        """A regular expression for the prefixes of blocks."""
        stage = self.stage.replace(".", r"\.").format(
            stage=r"(?P<stage>\d+)", stage0=r"(?P<stage0>\d+)", part="(?P<part>_first|_second|)"
        )
        inner = r"\.blocks" if self.plus else ""
        return rf"{re.escape(self.stem)}|{stage}{inner}\.(?P<index>\d+)"

    def kernels(self, shapes: Shapes, children: Collection[str]) -> dict[str, tuple[int, int]]:
        """As `Naming.kernels`."""
        names = [self.children[child] for child in children if child in self.children]
        if not names:
            return {}
        child = "|".join(map(re.escape, names))
        pattern = re.compile(rf"({self._blocks})\.({child})\.weight", re.ASCII)
        matches = [
            (match.groupdict(), shape)
            for key, shape in shapes.items()
            if len(shape) == 4 and (match := pattern.fullmatch(key))
        ]
        # The second half of a stage counts its blocks from 0 again.
        first: dict[str, int] = {}
        for place, _ in matches:
            if place.get("part") == "_first":
                first[place["stage"]] = max(first.get(place["stage"], 0), int(place["index"]) + 1)
        found = {}
        for place, shape in matches:
            layer = "stem"
            if place["index"] is not None:
                number = int(place["stage"]) if "stage" in place else int(place["stage0"]) + 1
                start = first.get(place["stage"], 0) if place.get("part") == "_second" else 0
                layer = f"stage{number}_block{start + int(place['index'])}"
            found[layer] = (shape[1], shape[0])
        return found

    def num_classes(self, shapes: Shapes) -> int:
        """As `Naming.num_classes`."""
        return length(shapes.get(f"{self.head}.bias"))

    def _child(self, leaf: Leaf) -> str:
        """What is between the prefix of a module and the array's own name."""
        inner = "/".join(leaf.path[2:-1])
        if not inner:
            return ""
        names = _AUXILIARY if leaf.module.startswith("aux_") else self.children
        return f".{names[inner]}"

    def _prefixes(self, variant: Variant) -> dict[str, str]:
        """Prefixes of the blocks and heads, by our names."""
        prefixes = {"stem": self.stem, "head": self.head}
        for stage in range(1, len(variant.depths) + 1):
            ends = _ends(variant, stage)
            start = 0
            for end, part in zip(ends, [""] if len(ends) == 1 else _PARTS, strict=True):
                container = self.stage.format(stage=stage, stage0=stage - 1, part=part)
                blocks = f"{container}.blocks" if self.plus else container
                for index in range(start, end):
                    prefixes[f"stage{stage}_block{index}"] = f"{blocks}.{index - start}"
                prefixes[f"aux_stage{stage}_block{end - 1}"] = f"{container}_aux"
                start = end
        return prefixes


_PARTS = ("_first", "_second")


def _ends(variant: Variant, stage: int) -> list[int]:
    """Where the containers of a stage end: RepVGGplus ends one at every auxiliary head."""
    depth = sum(layer.stage == f"stage{stage}" for layer in variant.layers())
    tapped = (i for i in range(depth) if f"stage{stage}_block{i}" in variant.auxiliary)
    return sorted({*(index + 1 for index in tapped), depth})


def torch_entries(found: Iterable[Leaf], module: Callable[[Leaf], str]) -> tuple[Entry, ...]:
    """Arrays as PyTorch names and arranges them; `module` names what an array belongs to."""
    entries = []
    for leaf in found:
        prefix = module(leaf)
        shape, axes = _torch_layout(leaf)
        entries.append(Entry(f"{prefix}.{_TORCH_LEAVES[leaf.path[-1]]}", shape, leaf, axes))
        if leaf.path[-1] == "var":
            entries.append(Entry(f"{prefix}.num_batches_tracked", (), None))
    return tuple(entries)


def length(shape: tuple[int, ...] | None) -> int:
    """The length of a vector, 0 for anything else."""
    return shape[0] if shape is not None and len(shape) == 1 else 0


def _torch_layout(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An array's shape in PyTorch, and the transposition from ours to it."""
    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[len(leaf.shape)]
    shape = tuple(leaf.shape[axis] for axis in axes)
    if leaf.kind is Kind.LINEAR:
        return shape[:2], axes
    return (*shape, 1, 1) if leaf.kind is Kind.GATE else shape, axes


_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# Children of RepVGGplus's auxiliary heads, a torch Sequential.
_AUXILIARY = {"conv": "0.conv", "bn": "0.bn", "logits": "3"}
