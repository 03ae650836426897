"""timm's names of RepViT, in training form and after its `fuse`."""

import re
from collections import Counter
from collections.abc import Collection

from repvgg_jax.variants import Variant
from repvgg_jax.weights.naming import Entry, length, torch_entries
from repvgg_jax.weights.tensor import Shapes
from repvgg_jax.weights.tree import Leaf, leaves

_MIXER = {
    "conv_dense": "token_mixer.conv.c",
    "bn_dense": "token_mixer.conv.bn",
    "conv_point": "token_mixer.conv1",
    "bn_mixer": "token_mixer.bn",
    "reparam": "token_mixer",
    "se/reduce": "se.fc1",
    "se/expand": "se.fc2",
}
_CONV = {"conv_single": "c", "bn_single": "bn", "reparam": ""}
_HEAD = {
    "bn_head": "head.bn",
    "head": "head.l",
    "bn_head_dist": "head_dist.bn",
    "head_dist": "head_dist.l",
    "reparam": "",
}
"""timm's names of children, by ours."""

_BLOCK = ("", "channel_mixer.conv1", "channel_mixer.conv2")
_DOWNSAMPLE = (
    *(f"pre_block.{name}".strip(".") for name in _BLOCK),
    *("spatial_downsample", "channel_downsample", "ffn.conv1", "ffn.conv2"),
)
"""timm's names of the layers of a block, and of those before the first block of a stage."""

_CHANNELS = "channel_mixer\\.conv[12]"
_LAYER = (
    r"stem\.conv[12]|stages\.\d+\.(?:"
    rf"blocks\.\d+(?:\.{_CHANNELS})?|downsample\.(?:pre_block(?:\.{_CHANNELS})?"
    r"|spatial_downsample|channel_downsample|ffn\.conv[12]))"
)


class RepViTNaming:
    """The names of a network in which the layers of a block have modules of their own."""

    family = "timm"

    def covers(self, variant: Variant) -> bool:
        """As `Naming.covers`."""
        if variant.block != "repvit" or variant.head == "linear":
            return False
        counts = Counter(layer.stage for layer in variant.layers())
        expected = {
            f"stage{stage + 1}": len(_BLOCK) * depth + (len(_DOWNSAMPLE) if stage else 0)
            for stage, depth in enumerate(variant.depths)
        }
        return counts == {"stem": 2, **expected}

    def entries(
        self, variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
    ) -> tuple[Entry, ...]:
        """As `Naming.entries`."""
        found = leaves(variant, deploy=deploy, num_classes=num_classes, in_channels=in_channels)
        return torch_entries(found, self._module)

    def prefixes(self, shapes: Shapes, children: Collection[str]) -> Counter[str]:
        """As `Naming.prefixes`."""
        pattern = re.compile(rf"(?:^|\.)((?:{_LAYER})\.{self._ends(children)}weight)$", re.ASCII)
        return Counter(
            key[: match.start(1)]
            for key, shape in shapes.items()
            if len(shape) == 4 and (match := pattern.search(key))
        )

    def owns(self, key: str) -> bool:
        """As `Naming.owns`."""
        return re.match(r"(stem|stages|head)\.", key) is not None

    def kernels(self, shapes: Shapes, children: Collection[str]) -> dict[str, tuple[int, int]]:
        """As `Naming.kernels`."""
        pattern = re.compile(rf"({_LAYER})\.{self._ends(children)}weight", re.ASCII)
        return {
            _our_layer(match[1]): (shape[1], shape[0])
            for key, shape in shapes.items()
            if len(shape) == 4 and (match := pattern.fullmatch(key))
        }

    def num_classes(self, shapes: Shapes) -> int:
        """As `Naming.num_classes`."""
        return length(shapes.get("head.head.l.bias", shapes.get("head.bias")))

    @staticmethod
    def _ends(children: Collection[str]) -> str:
        """A regular expression for what is between a layer and the leaf's own name."""
        names = {table[child] for child in children for table in (_MIXER, _CONV) if child in table}
        return "(?:" + "|".join(rf"{re.escape(name)}\." if name else "" for name in names) + ")"

    @staticmethod
    def _module(leaf: Leaf) -> str:
        """What timm calls the module of an array."""
        child = "/".join(leaf.path[2:-1])
        if leaf.module == "head":
            prefix, children = "head", _HEAD
        else:
            prefix, is_mixer = _their_layer(leaf.module)
            children = _MIXER if is_mixer else _CONV
        return f"{prefix}.{children[child]}".rstrip(".")


def _their_layer(name: str) -> tuple[str, bool]:
    """Timm's prefix of a layer, and whether it is a mixer, whose gate is beside it."""
    stage, _, number = name.partition("_block")
    index = int(number or 0)
    if stage == "stem":
        return f"stem.conv{index + 1}", False
    place = f"stages.{int(stage.removeprefix('stage')) - 1}"
    first = 0 if stage == "stage1" else len(_DOWNSAMPLE)
    if index < first:
        return f"{place}.downsample.{_DOWNSAMPLE[index]}", index == 0
    block, part = divmod(index - first, len(_BLOCK))
    return f"{place}.blocks.{block}.{_BLOCK[part]}".rstrip("."), part == 0


def _our_layer(prefix: str) -> str:
    """The inverse of `_their_layer`."""
    if prefix.startswith("stem"):
        return "stem" if prefix == "stem.conv1" else "stem_block1"
    _, stage, kind, *rest = prefix.split(".")
    if kind == "downsample":
        index = _DOWNSAMPLE.index(".".join(rest))
    else:
        first = len(_DOWNSAMPLE) if int(stage) else 0
        index = first + len(_BLOCK) * int(rest[0]) + _BLOCK.index(".".join(rest[1:]))
    return f"stage{int(stage) + 1}_block{index}"
