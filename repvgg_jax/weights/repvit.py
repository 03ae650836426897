"""Names of RepViT by its authors and by timm, in training form and after their fuses.

    family       layers of a block                                       classifier
    official     features.1.token_mixer, .channel_mixer.m.0, .m.2        classifier.classifier.l
    timm         stages.0.blocks.0.token_mixer, .channel_mixer.conv1, …  head.head.l

The authors number the blocks of the whole network, timm those of a stage. What halves height and
width is two blocks to the authors, a normal one and one of stride 2, and one module to timm.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from repvgg_jax.variants import Variant
from repvgg_jax.weights.naming import Entry, length, torch_entries
from repvgg_jax.weights.tensor import Shapes
from repvgg_jax.weights.tree import Leaf, leaves


class _Module(NamedTuple):
    """What a project calls a layer or the classifier, and the children of it by our names."""

    prefix: str
    children: Mapping[str, str]

    def child(self, name: str) -> str:
        """What it calls one of them."""
        return f"{self.prefix}.{self.children[name]}".rstrip(".")


_CONV = {"conv_single": "c", "bn_single": "bn", "reparam": ""}
"""Children of a convolution with its norm, in both projects."""


class _Naming:
    """The names of a network in which the layers of a block have modules of their own.

    Attributes:
      family: the project.
      mixer: names of a mixer's children, by ours; its gate is beside it.
      head: the classifier.
      shown: a regular expression for the prefixes of layers by which a network is found.
      owned: a regular expression for the first parts of its keys.
    """

    family: str
    mixer: Mapping[str, str]
    head: _Module
    shown: str
    owned: str

    def places(self, depths: tuple[int, ...]) -> Iterator[tuple[str, str, bool]]:
        """Layers in order: the stage, the project's prefix, and whether it is a mixer."""
        raise NotImplementedError

    def depths(self, shapes: Shapes) -> tuple[int, ...]:
        """How many blocks of every stage are among these arrays."""
        raise NotImplementedError

    def covers(self, variant: Variant) -> bool:
        """As `Naming.covers`."""
        if variant.block != "repvit" or variant.head == "linear":
            return False
        return self._modules(variant.depths).keys() == {layer.name for layer in variant.layers()}

    def entries(
        self, variant: Variant, *, deploy: bool, num_classes: int, in_channels: int = 3
    ) -> tuple[Entry, ...]:
        """As `Naming.entries`."""
        modules = {**self._modules(variant.depths), "head": self.head}
        found = leaves(variant, deploy=deploy, num_classes=num_classes, in_channels=in_channels)

        def module(leaf: Leaf) -> str:
            return modules[leaf.module].child("/".join(leaf.path[2:-1]))

        return torch_entries(found, module)

    def prefixes(self, shapes: Shapes, children: Collection[str]) -> Counter[str]:
        """As `Naming.prefixes`."""
        names = {table[c] for table in (self.mixer, _CONV) for c in table.keys() & children}
        ends = "|".join(rf"{re.escape(name)}\." if name else "" for name in names)
        pattern = re.compile(rf"(?:^|\.)((?:{self.shown})\.(?:{ends})weight)$", re.ASCII)
        return Counter(
            key[: match.start(1)]
            for key, shape in shapes.items()
            if len(shape) == 4 and (match := pattern.search(key))
        )

    def owns(self, key: str) -> bool:
        """As `Naming.owns`."""
        return re.match(rf"(?:{self.owned})\.", key, re.ASCII) is not None

    def kernels(self, shapes: Shapes, children: Collection[str]) -> dict[str, tuple[int, int]]:
        """As `Naming.kernels`."""
        found = {}
        for name, module in self._modules(self.depths(shapes)).items():
            for child in module.children.keys() & children:
                shape = shapes.get(f"{module.child(child)}.weight", ())
                if len(shape) == 4:
                    found[name] = (shape[1], shape[0])
        return found

    def num_classes(self, shapes: Shapes) -> int:
        """As `Naming.num_classes`."""
        keys = (f"{self.head.child(name)}.bias" for name in ("head", "reparam"))
        return next((length(shapes[key]) for key in keys if key in shapes), 0)

    def _modules(self, depths: tuple[int, ...]) -> dict[str, _Module]:
        """The modules of a network's layers, by our names."""
        modules: dict[str, _Module] = {}
        count: Counter[str] = Counter()
        for stage, prefix, is_mixer in self.places(depths):
            first = stage == "stem" and not count[stage]
            name = stage if first else f"{stage}_block{count[stage]}"
            modules[name] = _Module(prefix, self.mixer if is_mixer else _CONV)
            count[stage] += 1
        return modules


class Authors(_Naming):
    """The names of THU-MIG/RepViT, model/repvit.py."""

    family = "official"
    mixer = {
        "conv_dense": "0.conv.c",
        "bn_dense": "0.conv.bn",
        "conv_point": "0.conv1",
        "bn_mixer": "0.bn",
        "reparam": "0",
        "se/reduce": "1.fc1",
        "se/expand": "1.fc2",
    }
    head = _Module(
        "classifier",
        {
            "bn_head": "classifier.bn",
            "head": "classifier.l",
            "bn_head_dist": "classifier_dist.bn",
            "head_dist": "classifier_dist.l",
            "reparam": "",
        },
    )
    # Without the stem, which fused is named as that of many other networks.
    shown = r"features\.\d+\.(?:token_mixer(?:\.[02])?|channel_mixer\.m\.[02])"
    owned = r"features\.\d+|classifier"

    def places(self, depths: tuple[int, ...]) -> Iterator[tuple[str, str, bool]]:
        """As `_Naming.places`."""
        numbers = itertools.count(1)

        def block(*mixer: str) -> Iterator[tuple[str, str, bool]]:
            prefix = f"features.{next(numbers)}"
            for part in (*mixer, "channel_mixer.m.0", "channel_mixer.m.2"):
                yield stage, f"{prefix}.{part}", part == "token_mixer"

        yield from (("stem", f"features.0.{part}", False) for part in (0, 2))
        for index, depth in enumerate(depths):
            stage = f"stage{index + 1}"
            if index:
                yield from block("token_mixer")
                yield from block("token_mixer.0", "token_mixer.2")
            for _ in range(depth):
                yield from block("token_mixer")

    def depths(self, shapes: Shapes) -> tuple[int, ...]:
        """As `_Naming.depths`: those of stride 2 have a second convolution in the mixer's place."""
        strided: dict[str, bool] = {}
        for key in shapes:
            if match := re.match(r"features\.(\d+)\.(token_mixer\.2\.)?", key, re.ASCII):
                strided[match[1]] = strided.get(match[1], False) or bool(match[2])
        strided.pop("0", None)
        numbers = sorted(strided, key=lambda number: (len(number), number))
        ends = [i for i, number in enumerate(numbers) if strided[number]]
        starts = [0, *(end + 1 for end in ends)]
        # The last block before one of stride 2 belongs to the next stage, as that one does.
        stops = [*(end - 1 for end in ends), len(numbers)]
        return tuple(max(0, stop - start) for start, stop in zip(starts, stops, strict=True))


class Timm(_Naming):
    """The names of timm, models/repvit.py."""

    family = "timm"
    mixer = {
        "conv_dense": "token_mixer.conv.c",
        "bn_dense": "token_mixer.conv.bn",
        "conv_point": "token_mixer.conv1",
        "bn_mixer": "token_mixer.bn",
        "reparam": "token_mixer",
        "se/reduce": "se.fc1",
        "se/expand": "se.fc2",
    }
    head = _Module(
        "head",
        {
            "bn_head": "head.bn",
            "head": "head.l",
            "bn_head_dist": "head_dist.bn",
            "head_dist": "head_dist.l",
            "reparam": "",
        },
    )
    shown = (
        r"stem\.conv[12]|stages\.\d+\.(?:(?:blocks\.\d+|downsample\.pre_block)"
        r"(?:\.channel_mixer\.conv[12])?"
        r"|downsample\.(?:spatial_downsample|channel_downsample|ffn\.conv[12]))"
    )
    owned = "stem|stages|head"

    def places(self, depths: tuple[int, ...]) -> Iterator[tuple[str, str, bool]]:
        """As `_Naming.places`."""

        def block(prefix: str) -> Iterator[tuple[str, str, bool]]:
            yield stage, prefix, True
            yield from ((stage, f"{prefix}.channel_mixer.conv{n}", False) for n in (1, 2))

        yield from (("stem", f"stem.conv{n}", False) for n in (1, 2))
        for index, depth in enumerate(depths):
            stage, place = f"stage{index + 1}", f"stages.{index}"
            if index:
                yield from block(f"{place}.downsample.pre_block")
                for part in ("spatial_downsample", "channel_downsample", "ffn.conv1", "ffn.conv2"):
                    yield stage, f"{place}.downsample.{part}", False
            for number in range(depth):
                yield from block(f"{place}.blocks.{number}")

    def depths(self, shapes: Shapes) -> tuple[int, ...]:
        """As `_Naming.depths`."""
        pattern = re.compile(r"(stages\.\d+)\.blocks\.\d+(?=\.)", re.ASCII)
        blocks = {match[0]: match[1] for key in shapes if (match := pattern.match(key))}
        count = Counter(blocks.values())
        return tuple(count[f"stages.{stage}"] for stage in range(len(count)))
