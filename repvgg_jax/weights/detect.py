"""Which network a state dict belongs to: family, form, variant and classes.

Family and form are read off the keys of the blocks' main kernels, depths off their names, and
widths, groups and squeeze-and-excite off their shapes. That selects one architecture, whose
keys and shapes are then compared one by one.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from repvgg_jax.reparam.linear import walk
from repvgg_jax.reparam.terms import Conv
from repvgg_jax.text import first_few, plural
from repvgg_jax.variants import ALL, Variant
from repvgg_jax.weights.names import NAMINGS
from repvgg_jax.weights.naming import Entry, Naming
from repvgg_jax.weights.tensor import Shapes


class UnknownVariantError(ValueError):
    """The weights of a RepVGG whose architecture is none of those considered.

    Attributes:
      architecture: its depths and widths in words.
    """

    def __init__(self, message: str, architecture: str):
        super().__init__(message)
        self.architecture = architecture


class Differences(NamedTuple):
    """How the arrays that were found differ from those that were expected.

    Attributes:
      missing: keys that were not found.
      unexpected: keys that were found only.
      misshaped: keys that were found with another shape, with both shapes.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(
            f"{len(keys)} {what} [{first_few(keys)}]"
            for what, keys in zip(self._fields, self, strict=True)
            if keys
        )


def differences(
    expected: Shapes, found: Shapes, *, optional: Collection[str] = frozenset()
) -> Differences:
    """Compares two sets of arrays by key and shape; `optional` keys may be missing."""
    return Differences(
        missing=tuple(key for key in expected if key not in found and key not in optional),
        unexpected=tuple(key for key in found if key not in expected),
        misshaped=tuple(
            f"{key} {found[key]} instead of {shape}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ),
    )


class Detected(NamedTuple):
    """The network that a state dict belongs to.

    Attributes:
      variant: the architecture.
      deploy: whether it is the fused form instead of the training form.
      num_classes: width of its classifier; 0 if it has none.
      in_channels: channels of its images.
      family: the project that uses these names.
      entries: its arrays; all of them were found, with the right shapes.
      prefix: what precedes their keys, e.g. `module.backbone.`.
      unused: keys of other arrays: a neck, another head, a counter.
    """

    variant: Variant
    deploy: bool
    num_classes: int
    in_channels: int
    family: str
    entries: tuple[Entry, ...]
    prefix: str = ""
    unused: tuple[str, ...] = ()


class _Place(NamedTuple):
    """Where blocks are: how many, and in which naming, form and prefix."""

    blocks: int
    naming: Naming
    deploy: bool
    prefix: str


def has_blocks(shapes: Shapes, variant: Variant | None = None) -> bool:
    """Whether there is any block among these arrays."""
    return bool(_places(shapes, _considered(variant), NAMINGS))


def _considered(variant: Variant | None) -> list[Variant]:
    return [variant] if variant is not None else list(ALL.values())


def _places(
    shapes: Shapes, considered: Iterable[Variant], namings: Iterable[Naming]
) -> list[_Place]:
    # Every block has its form's main kernel.
    return [
        _Place(count, naming, deploy, prefix)
        for deploy, kernels in _main_kernels(considered).items()
        for naming in namings
        for prefix, count in naming.prefixes(shapes, kernels).items()
    ]


def _best_places(
    shapes: Shapes, considered: Iterable[Variant], namings: Iterable[Naming]
) -> list[_Place]:
    """Where most blocks are, if that is one network; several namings may have the same keys."""
    places = _places(shapes, considered, namings)
    if not places:
        raise ValueError(_unknown(shapes))
    best = max(places, key=lambda place: place.blocks)
    prefixes = [
        place.prefix or "none"
        for place in places
        if place.naming is best.naming and 2 * place.blocks >= best.blocks
    ]
    if len(set(prefixes)) > 1:
        names = list(dict.fromkeys(prefixes))
        raise ValueError(
            f"contains {len(names)} networks, with the prefixes {first_few(names)}; choose with "
            f"entry={next(name for name in names if name != 'none')!r}"
        )
    return [place for place in places if (place.blocks, place.prefix) == (best.blocks, best.prefix)]


def detect(
    shapes: Shapes, *, variant: Variant | None = None, namings: Iterable[Naming] = NAMINGS
) -> Detected:
    """Finds the network whose arrays these are.

    Args:
      shapes: of all arrays, by key.
      variant: the only architecture to consider; None considers the official ones.
      namings: the namings to consider.

    Raises:
      ValueError: no network has exactly these arrays. The message lists missing, unexpected
        and misshaped keys with respect to the nearest one, or names the other architecture
        that this is.
      UnknownVariantError: it is a RepVGG, but none of the official ones.
    """
    considered = _considered(variant)
    everything = shapes
    places = _best_places(shapes, considered, namings)
    fits = [fit for place in places if (fit := _nearest(_inside(shapes, place), considered, place))]
    if not fits:
        naming, shapes = places[0].naming, _inside(shapes, places[0])
        blocks = naming.kernels(shapes, _main_kernels(considered)[places[0].deploy])
        names = " and ".join(candidate.name for candidate in considered)
        architecture = _architecture(_found(shapes, naming, blocks))
        raise ValueError(f"{architecture} ({naming.family} names) does not fit {names}")
    # Authors who started from RepVGG's code named some children as it does.
    fit = min(fits, key=_Fit.distance) if len(fits) > 1 else fits[0]
    nearest, (_, naming, deploy, prefix), found, in_channels, shapes = fit
    unused = tuple(key for key in everything if key.removeprefix(prefix) not in shapes)
    num_classes = naming.num_classes(shapes)
    entries = naming.entries(
        nearest, deploy=deploy, num_classes=num_classes, in_channels=in_channels
    )
    wrong = differences(
        {entry.key: entry.shape for entry in entries},
        shapes,
        # Old versions of PyTorch and other writers leave out num_batches_tracked.
        optional={entry.key for entry in entries if entry.leaf is None},
    )
    if not any(wrong):
        return Detected(
            *(nearest, deploy, num_classes, in_channels, naming.family),
            *(entries, prefix, unused),
        )
    if sum(entry.key in shapes for entry in entries) <= len(entries) / 10:
        raise ValueError(_unknown(everything))
    form = "deploy" if deploy else "training"
    classifier = "" if num_classes else ", without a classifier"
    architecture = _architecture(found)
    under = f" under {prefix}" if prefix else ""
    message = (
        f"nearest to {nearest.name} ({naming.family} names{under}, {form} form{classifier}), "
        f"but {wrong}"
    )
    if unused:
        message += f"; {plural(len(unused), 'other array')} [{first_few(unused)}]"
    if variant is None and "stem" in found and architecture != _architecture(_blocks(nearest)):
        hint = f"these have {architecture}, pass variant= if that is one of your own"
        raise UnknownVariantError(f"{message}; {hint}", architecture)
    raise ValueError(message)


class _Fit(NamedTuple):
    """A network that a state dict could belong to; `shapes` are the arrays at its place."""

    variant: Variant
    place: _Place
    found: dict[str, "_Block"]
    in_channels: int
    shapes: Shapes

    def distance(self) -> tuple[int, int]:
        """How many keys are unexpected, and how many are missing."""
        naming = self.place.naming
        entries = naming.entries(
            self.variant,
            deploy=self.place.deploy,
            num_classes=naming.num_classes(self.shapes),
            in_channels=self.in_channels,
        )
        keys = {entry.key for entry in entries}
        return len(self.shapes.keys() - keys), len(keys - self.shapes.keys())


def _nearest(shapes: Shapes, considered: Iterable[Variant], place: _Place) -> _Fit | None:
    """The nearest of the networks that a naming has names for; None if there is none."""
    naming = place.naming
    candidates = [candidate for candidate in considered if naming.covers(candidate)]
    if not candidates:
        return None
    blocks = naming.kernels(shapes, _main_kernels(considered)[place.deploy])
    found, in_channels = _found(shapes, naming, blocks), blocks.get("stem", (3, 0))[0]
    overlaps = [_overlap(_blocks(candidate), found) for candidate in candidates]
    fits = [
        _Fit(candidate, place, found, in_channels, shapes)
        for candidate, overlap in zip(candidates, overlaps, strict=True)
        if overlap == max(overlaps)
    ]
    # Networks of the same widths, such as RepVGG and QARepVGG, have other children.
    return min(fits, key=_Fit.distance) if len(fits) > 1 else fits[0]


def _inside(shapes: Shapes, place: _Place) -> dict[str, tuple[int, ...]]:
    """The arrays at a place that its naming knows, without the prefix."""
    return {
        key.removeprefix(place.prefix): shape
        for key, shape in shapes.items()
        if key.startswith(place.prefix) and place.naming.owns(key.removeprefix(place.prefix))
    }


def _found(
    shapes: Shapes, naming: Naming, blocks: Mapping[str, tuple[int, int]]
) -> dict[str, "_Block"]:
    """What these arrays show of every block."""
    found = {
        name: _Block(inputs if name != "stem" else None, features)
        for name, (inputs, features) in blocks.items()
    }
    for name, (_, squeezed) in naming.kernels(shapes, ("se/reduce",)).items():
        if name in found:
            found[name] = found[name]._replace(squeezed=squeezed)
    return found


def _unknown(shapes: Shapes) -> str:
    """Why these are not the weights of a RepVGG."""
    for pattern, what in _OTHERS:
        if any(re.search(pattern, key) for key in shapes):
            return f"weights of {what}, not of a RepVGG; keys: {first_few(shapes)}"
    return f"not a RepVGG checkpoint: most keys are unknown, e.g. [{first_few(shapes)}]"


_OTHERS = (
    (r"(conv_scale|rbr_scale|conv_kxk\.\d|rbr_conv\.\d)", "a MobileOne"),
    (r"(^|\.)layer[1-4]\.\d+\.conv[12]\.weight$", "a ResNet"),
    (r"(^|\.)blocks\.\d+\.attn\.qkv\.", "a vision transformer"),
    (r"(^|\.)encoder\.layers?\.", "a transformer"),
    (r"(^|\.)features\.\d+\.weight$", "a plain VGG or AlexNet"),
    (r"(^|\.)rbr_(dense|1x1)\.weight$", "a block without batch normalization in its branches"),
    (r"dbb_origin", "a Diverse Branch Block network"),
)
"""Keys of other architectures."""


def _main_kernels(variants: Iterable[Variant]) -> dict[bool, set[str]]:
    """By `deploy`: children that every block has and whose kernels show its widths."""
    names: dict[bool, set[str]] = {False: set(), True: set()}
    for block in itertools.chain.from_iterable(variant.blocks for variant in variants):
        names[True].add(block.deploy)
        names[False].add(next(term.name for term in walk(block.train) if isinstance(term, Conv)))
    return names


class _Block(NamedTuple):
    """What tells the blocks of variants apart; `inputs` per group, None for the stem."""

    inputs: int | None
    features: int
    squeezed: int = 0


def _blocks(variant: Variant) -> dict[str, _Block]:
    return {
        layer.name: _Block(
            layer.in_channels and layer.in_channels // layer.groups,
            layer.features,
            layer.se.squeezed(layer.features) if layer.se else 0,
        )
        for layer in variant.layers()
    }


def _overlap(expected: Mapping[str, _Block], found: Mapping[str, _Block]) -> tuple[int, int]:
    """How many blocks are equal, then how few differ; larger is nearer."""
    return len(expected.items() & found.items()), -len(expected.items() ^ found.items())


def _architecture(blocks: Mapping[str, _Block]) -> str:
    """Depths and widths in words."""
    stem = blocks["stem"].features if "stem" in blocks else "unknown"
    widths: dict[int, dict[int, int]] = {}
    for name, block in blocks.items():
        if not name.startswith("stem"):
            stage, index = map(int, name.removeprefix("stage").split("_block"))
            widths.setdefault(stage, {})[index] = block.features
    stages = sorted(widths)
    depths = tuple(max(widths[stage]) + 1 for stage in stages)
    channels = []
    for stage in stages:
        each = tuple(widths[stage][index] for index in sorted(widths[stage]))
        channels.append(each if len(set(each)) > 1 else each[0])
    return f"depths {depths}, channels {tuple(channels)}, stem_channels {stem}"
