"""How the RepVGG projects of the world name and lay out their weights.

A `Naming` translates the list of `repvgg_jax.weights.tree.leaves` into a project's keys and
shapes. Readers and writers use the same translation, one in each direction, so what is
written is read back as the same numbers.

    family       block prefix            3x3 branch           classifier
    official     stage1.0.               rbr_dense.conv/bn    linear.
    timm         stages.0.0.             conv_kxk.conv/bn     head.fc.
    mmpretrain   backbone.stage_1.0.     branch_3x3.conv/norm head.fc.
    flax         params/stage1_block0/   conv3x3, bn3x3       params/head/

The authors' RepVGGplus is a second naming of the family `official`: its stages hold their
blocks in `blocks`, stage 3 is two containers, and squeeze-and-excite is `post_se`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from repvgg_jax.variants import Variant
from repvgg_jax.weights.tree import Kind, Leaf, leaves


class Entry(NamedTuple):
    """One array under a project's name.

    Attributes:
      key: the project's name for it.
      shape: its shape there.
      leaf: the array of our tree; None for PyTorch's count of batches, which we do not keep.
      axes: the transposition that leads from our layout to theirs, up to axes of length 1.
    """

    key: str
    shape: tuple[int, ...]
    leaf: Leaf | None
    axes: tuple[int, ...] = ()

    def from_ours(self, array: np.ndarray) -> np.ndarray:
        """An array of our tree in this layout."""
        return array.transpose(self.axes).reshape(self.shape)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """An array of this layout as our tree has it."""
        assert self.leaf is not None
        transposed = tuple(self.leaf.shape[axis] for axis in self.axes)
        return array.reshape(transposed).transpose(np.argsort(self.axes))


class Naming(Protocol):
    """One way to name the arrays of a RepVGG."""

    @property
    def family(self) -> str:
        """The project that names them so."""

    def covers(self, variant: Variant) -> bool:
        """Whether it has names for such a network."""

    def entries(
        self, variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
    ) -> tuple[Entry, ...]:
        """Names, shapes and layouts of all arrays of a variant it covers."""

    def measure(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
        """The classes and the image channels that arrays under these names speak of."""


class FlaxNaming:
    """Our own tree, flattened: paths joined by slashes, shapes and layouts as they are."""

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

    def measure(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
        """As `Naming.measure`."""
        kernels = (f"params/stem/{piece}/kernel" for piece in _STEM_KERNELS)
        return _length(shapes, ("params/head/bias",), 0, 1), _length(shapes, kernels, 2, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchNaming:
    """A PyTorch project's names, in PyTorch's layouts.

    Attributes:
      family: the project.
      stem: prefix of the stem.
      stage: prefix of a container of blocks: `{stage}` counts from 1, `{stage0}` from 0, and
        `{part}` tells the two halves of a split stage apart.
      pieces: the project's names of a block's children, by ours.
      head: prefix of the classifier.
      plus: whether these are names for RepVGGplus, or for everything else.
    """

    family: str
    stem: str
    stage: str
    pieces: Mapping[str, str]
    head: str
    plus: bool = False

    def covers(self, variant: Variant) -> bool:
        """Whether the project has names for such a network."""
        after_relu = variant.se is not None and variant.se.after_relu
        if self.plus != (after_relu or bool(variant.auxiliary)):
            return False
        splits = (len(_ends(variant, stage)) for stage in range(1, len(variant.depths) + 1))
        return "stem" not in variant.auxiliary and max(splits) <= len(_PARTS)

    def entries(
        self, variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
    ) -> tuple[Entry, ...]:
        """As `Naming.entries`."""
        owners = self._owners(variant)
        found = []
        for leaf in leaves(
            variant, deploy=deploy, num_classes=num_classes, in_channels=in_channels
        ):
            prefix = f"{owners[leaf.owner]}{self._piece(leaf)}"
            shape, axes = _torch_layout(leaf)
            found.append(Entry(f"{prefix}.{_TORCH_LEAVES[leaf.path[-1]]}", shape, leaf, axes))
            if leaf.path[-1] == "var":
                found.append(Entry(f"{prefix}.num_batches_tracked", (), None))
        return tuple(found)

    def measure(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
        """As `Naming.measure`."""
        kernels = (f"{self.stem}.{self.pieces[piece]}.weight" for piece in _STEM_KERNELS)
        return _length(shapes, (f"{self.head}.bias",), 0, 1), _length(shapes, kernels, 1, 4)

    def _piece(self, leaf: Leaf) -> str:
        """What comes between the owner's prefix and the array's own name."""
        inner = "/".join(leaf.path[2:-1])
        if not inner:
            return ""
        names = _AUXILIARY if leaf.owner.startswith("aux_") else self.pieces
        return f".{names[inner]}"

    def _owners(self, variant: Variant) -> dict[str, str]:
        """Prefixes of the blocks and heads."""
        owners = {"stem": self.stem, "head": self.head}
        for stage in range(1, len(variant.depths) + 1):
            ends = _ends(variant, stage)
            start = 0
            for end, part in zip(ends, [""] if len(ends) == 1 else _PARTS, strict=True):
                container = self.stage.format(stage=stage, stage0=stage - 1, part=part)
                blocks = f"{container}.blocks" if self.plus else container
                for index in range(start, end):
                    owners[f"stage{stage}_block{index}"] = f"{blocks}.{index - start}"
                owners[f"aux_stage{stage}_block{end - 1}"] = f"{container}_aux"
                start = end
        return owners


_PARTS = ("_first", "_second")


def _ends(variant: Variant, stage: int) -> list[int]:
    """Where the containers of a stage end: RepVGGplus ends one at every auxiliary head."""
    depth = variant.depths[stage - 1]
    tapped = (i for i in range(depth) if f"stage{stage}_block{i}" in variant.auxiliary)
    return sorted({*(index + 1 for index in tapped), depth})


_STEM_KERNELS = ("conv3x3", "reparam")

_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# Children of RepVGGplus's auxiliary heads, a torch Sequential.
_AUXILIARY = {"conv": "0.conv", "bn": "0.bn", "logits": "3"}

_OFFICIAL_PIECES = {
    "conv3x3": "rbr_dense.conv",
    "bn3x3": "rbr_dense.bn",
    "conv1x1": "rbr_1x1.conv",
    "bn1x1": "rbr_1x1.bn",
    "bn_identity": "rbr_identity",
    "reparam": "rbr_reparam",
}

OFFICIAL = TorchNaming(
    family="official",
    stem="stage0",
    stage="stage{stage}",
    pieces={**_OFFICIAL_PIECES, "se/reduce": "se.down", "se/expand": "se.up"},
    head="linear",
)
PLUS = TorchNaming(
    family="official",
    stem="stage0",
    stage="stage{stage}{part}",
    pieces={**_OFFICIAL_PIECES, "se/reduce": "post_se.down", "se/expand": "post_se.up"},
    head="linear",
    plus=True,
)
TIMM = TorchNaming(
    family="timm",
    stem="stem",
    stage="stages.{stage0}",
    pieces={
        "conv3x3": "conv_kxk.conv",
        "bn3x3": "conv_kxk.bn",
        "conv1x1": "conv_1x1.conv",
        "bn1x1": "conv_1x1.bn",
        "bn_identity": "identity",
        "reparam": "reparam_conv",
        "se/reduce": "attn.fc1",
        "se/expand": "attn.fc2",
    },
    head="head.fc",
)
MMPRETRAIN = TorchNaming(
    family="mmpretrain",
    stem="backbone.stem",
    stage="backbone.stage_{stage}",
    pieces={
        "conv3x3": "branch_3x3.conv",
        "bn3x3": "branch_3x3.norm",
        "conv1x1": "branch_1x1.conv",
        "bn1x1": "branch_1x1.norm",
        "bn_identity": "branch_norm",
        "reparam": "branch_reparam",
        "se/reduce": "se_layer.conv1.conv",
        "se/expand": "se_layer.conv2.conv",
    },
    head="head.fc",
)
FLAX = FlaxNaming()

NAMINGS: tuple[Naming, ...] = (OFFICIAL, PLUS, TIMM, MMPRETRAIN, FLAX)
"""All that readers recognise and writers produce."""

FAMILIES = tuple(dict.fromkeys(naming.family for naming in NAMINGS))
"""The families by name."""


def naming_for(family: str, variant: Variant) -> Naming:
    """The naming of a family that covers a variant.

    Raises:
      ValueError: unknown family, or the project has no names for such a network.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    for naming in NAMINGS:
        if naming.family == family and naming.covers(variant):
            return naming
    raise ValueError(
        f"{family} has no names for {variant.name}, for its squeeze-and-excite after the ReLU or "
        "its auxiliary heads; use the family official or flax"
    )


def _length(
    shapes: Mapping[str, tuple[int, ...]], keys: Iterable[str], axis: int, rank: int
) -> int | None:
    """The length of an axis of the first of these arrays that is there."""
    for key in keys:
        if len(shape := shapes.get(key, ())) == rank:
            return shape[axis]
    return None


def _torch_layout(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An array's shape in PyTorch, and the transposition that leads there."""
    axes = {
        Kind.CONVOLUTION: (3, 2, 0, 1),
        Kind.LINEAR: (1, 0),
        Kind.GATE: (1, 0),
        Kind.VECTOR: (0,),
    }[leaf.kind]
    shape = tuple(leaf.shape[axis] for axis in axes)
    return (*shape, 1, 1) if leaf.kind is Kind.GATE else shape, axes
