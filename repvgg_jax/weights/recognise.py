"""Which network a state dict is: family, form and variant, from its keys and shapes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from repvgg_jax.variants import VARIANTS, Variant
from repvgg_jax.weights.differences import Differences, Shapes, differences
from repvgg_jax.weights.names import NAMINGS, Entry, Naming
from repvgg_jax.weights.tensor import Tensor, describe
from repvgg_jax.weights.wording import some

WRAPPERS = ("state_dict", "model", "ema")
"""Keys under which training programs put the state dict."""

_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_MAX_NESTING = 4


class Recognised(NamedTuple):
    """What a state dict turned out to be.

    Attributes:
      variant: the architecture.
      deploy: the fused form instead of the training form.
      num_classes: of its classifier; 0 where it has none.
      in_channels: of the images that it takes.
      family: whose names these are.
      entries: the arrays, of which each is there with the right shape.
    """

    variant: Variant
    deploy: bool
    num_classes: int
    in_channels: int
    family: str
    entries: tuple[Entry, ...]


def unwrap(saved: Any, entry: str | None = None) -> dict[str, Tensor]:
    """The state dict inside whatever a training program saved.

    Sees through `state_dict`, `model` and `ema`, one inside another too, and through a prefix
    `module.` of all keys.

    Args:
      saved: a state dict or a mapping that holds one.
      entry: the key to take; None finds it.

    Raises:
      ValueError: there is no state dict in it, or several.
    """
    for _ in range(_MAX_NESTING):
        if not isinstance(saved, Mapping):
            raise ValueError(f"holds a {type(saved).__name__}, expected a mapping of arrays")
        if entry is not None:
            if not isinstance(saved.get(entry), Mapping):
                raise ValueError(f"holds no mapping {entry!r}; its keys are {some(saved)}")
            saved, entry = saved[entry], None
            continue
        inner = [key for key in WRAPPERS if isinstance(saved.get(key), Mapping)]
        if len(inner) > 1:
            raise ValueError(
                f"holds weights under {' and '.join(inner)}; say which with entry={inner[0]!r}"
            )
        if not inner:
            return _without_prefix(_arrays(saved))
        saved = saved[inner[0]]
    raise ValueError(f"nests {' / '.join(WRAPPERS)} more than {_MAX_NESTING} deep")


def recognise(
    shapes: Shapes, *, variant: Variant | None = None, namings: Iterable[Naming] = NAMINGS
) -> Recognised:
    """Finds the network whose every array is there, by name and by shape.

    Args:
      shapes: of all arrays, by key.
      variant: the only architecture to consider; None considers the official ones.
      namings: the namings to consider.

    Raises:
      ValueError: there is none. The message compares with the nearest one: missing,
        unexpected and misshaped keys; or says what else this may be.
    """
    considered = [variant] if variant is not None else list(VARIANTS.values())
    best: tuple[tuple[int, int], Recognised] | None = None
    for naming in namings:
        measured = naming.measure(shapes)
        num_classes, in_channels = measured[0] or 0, measured[1] or 3
        for candidate in filter(naming.covers, considered):
            for deploy in (False, True):
                entries = naming.entries(
                    candidate, deploy=deploy, num_classes=num_classes, in_channels=in_channels
                )
                found = Recognised(
                    candidate, deploy, num_classes, in_channels, naming.family, entries
                )
                fits = _differences(found, shapes)
                if not any(fits):
                    return found
                here = [entry for entry in entries if entry.key in shapes]
                rank = (len(here) - len(fits.misshaped) - len(fits.missing), -len(fits.unexpected))
                if len(here) > len(entries) / 10 and (best is None or rank > best[0]):
                    best = (rank, found)
    raise ValueError(_explain(best[1] if best else None, shapes))


def _differences(expected: Recognised, shapes: Shapes) -> Differences:
    # PyTorch's counts of batches may be absent: old versions and other writers leave them out.
    return differences(
        {entry.key: entry.shape for entry in expected.entries},
        shapes,
        optional={entry.key for entry in expected.entries if entry.leaf is None},
    )


def _explain(nearest: Recognised | None, shapes: Shapes) -> str:
    """Why this is no RepVGG, or no whole one."""
    for pattern, what in _OTHERS:
        if any(re.search(pattern, key) for key in shapes):
            return f"these are the weights of {what}, no RepVGG; its keys are {some(shapes)}"
    if nearest is None:
        return f"no RepVGG's weights: hardly a key is known, they are {some(shapes)}"
    form = "deploy" if nearest.deploy else "training"
    classifier = "" if nearest.num_classes else ", without a classifier"
    return (
        f"nearest to {nearest.variant.name} ({nearest.family} names, {form} form{classifier}), "
        f"but {_differences(nearest, shapes)}"
    )


_OTHERS = (
    (r"(conv_scale|rbr_scale|conv_kxk\.\d|rbr_conv\.\d)", "a MobileOne"),
    (r"(^|\.)layer[1-4]\.\d+\.conv[12]\.weight$", "a ResNet"),
    (r"(^|\.)blocks\.\d+\.attn\.qkv\.", "a vision transformer"),
    (r"(^|\.)encoder\.layers?\.", "a transformer"),
    (r"(^|\.)features\.\d+\.weight$", "a plain VGG or AlexNet"),
    (r"(^|\.)rbr_(dense|1x1)\.weight$", "a block without batch normalisation in its branches"),
    (r"dbb_origin", "a Diverse Branch Block network"),
)
"""Keys by which other networks are known."""


def _arrays(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    others: list[Any] = []
    for key, value in mapping.items():
        tensor = describe(value)
        if tensor is not None and isinstance(key, str):
            found[key] = tensor
        else:
            others.append(key)
    if not found:
        raise ValueError(f"holds no arrays; its keys are {some(others)}")
    if others:
        raise ValueError(
            f"holds arrays and other things side by side: {some(others)}; give the state dict"
        )
    return found


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES * 2:  # either may be around the other
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors
