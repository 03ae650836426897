"""The table of architectures: what every RepVGG is made of, as pure data.

Source: RepVGG (Ding et al., CVPR 2021), Tables 2 and 3, and the authors' code for
B*g2, D2se and plus-L2pse.
"""

import dataclasses
import re
import types
from collections.abc import Mapping

from repvgg_jax.architecture import Layer, SqueezeExcite, Variant, networks, residual_starts
from repvgg_jax.text import did_you_mean

__all__ = [
    "ALL",
    "FAMILY",
    "VARIANTS",
    "Layer",
    "SqueezeExcite",
    "Variant",
    "get_variant",
    "residual_starts",
]


def _scaled(
    name: str, depths: tuple[int, ...], width: tuple[float, float, float, float], **options
) -> Variant:
    """A variant from the paper's width multipliers (a, a, a, b)."""
    channels = tuple(int(base * w) for base, w in zip((64, 128, 256, 512), width, strict=True))
    options.setdefault("stem_channels", min(64, channels[0]))
    return Variant(name, depths, channels, **options)


_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_L = (8, 14, 24, 1)

_OFFICIAL = (
    _scaled("A0", _A, (0.75, 0.75, 0.75, 2.5)),
    _scaled("A1", _A, (1, 1, 1, 2.5)),
    _scaled("A2", _A, (1.5, 1.5, 1.5, 2.75)),
    _scaled("B0", _B, (1, 1, 1, 2.5)),
    _scaled("B1", _B, (2, 2, 2, 4)),
    _scaled("B1g2", _B, (2, 2, 2, 4), groups=2),
    _scaled("B1g4", _B, (2, 2, 2, 4), groups=4),
    _scaled("B2", _B, (2.5, 2.5, 2.5, 5)),
    _scaled("B2g2", _B, (2.5, 2.5, 2.5, 5), groups=2),
    _scaled("B2g4", _B, (2.5, 2.5, 2.5, 5), groups=4),
    _scaled("B3", _B, (3, 3, 3, 5)),
    _scaled("B3g2", _B, (3, 3, 3, 5), groups=2),
    _scaled("B3g4", _B, (3, 3, 3, 5), groups=4),
    _scaled("D2se", _L, (2.5, 2.5, 2.5, 5), se=SqueezeExcite(reduction=16)),
    _scaled(
        "plus-L2pse",
        _L,
        (2.5, 2.5, 2.5, 5),
        se=SqueezeExcite(reduction=4, after_relu=True),
        # The third tap is half-way through stage 3, where the authors split it in two.
        auxiliary=("stage1_block7", "stage2_block13", "stage3_block11"),
    ),
)

VARIANTS: Mapping[str, Variant] = types.MappingProxyType({v.name: v for v in _OFFICIAL})
"""The fifteen official variants by canonical name."""

FAMILY: Mapping[str, Variant] = types.MappingProxyType(
    {name: _scaled(name, **fields) for name, fields in networks.networks().items()}
)
"""Networks of other blocks by name: `mobileone_s0`, `qarepvgg_a0`, `repopt_b1`, `repvit_m0_9`, …"""

_SINGLE = {
    f"{name}_single": dataclasses.replace(variant, name=f"{name}_single", head="norm")
    for name, variant in FAMILY.items()
    if variant.head == "distilled"
}

ALL: Mapping[str, Variant] = types.MappingProxyType({**VARIANTS, **FAMILY, **_SINGLE})
"""`VARIANTS`, `FAMILY`, and `repvit_m0_9_single`, …: those trained without a teacher, of one head.

In deploy form both are one network.
"""


def _key(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("repvgg")
    return letters.replace("repoptvgg", "repopt")


def get_variant(name: str | Variant) -> Variant:
    """The variant of that name in `VARIANTS` or `FAMILY`; a `Variant` is returned as it is.

    `repvit_m0_9_single` has one classifier instead of RepViT's two, for training without a teacher.

    `B1g4`, `RepVGG-B1g4` and `repvgg_b1g4` all mean the same, and so do `RepOpt-VGG-B1` and
    `repopt_b1`, `RepViT-M0.9` and `repvit_m0_9`.

    Raises:
      ValueError: no such variant; the message names the nearest ones.
    """
    if isinstance(name, Variant):
        return name
    if not isinstance(name, str):
        raise ValueError(f"a variant is a name or a Variant, not {type(name).__name__}: {name!r}")
    names = {_key(canonical): canonical for canonical in ALL}
    if (key := _key(name)) in names:
        return ALL[names[key]]
    hint = did_you_mean(key, VARIANTS) or did_you_mean(name, FAMILY)
    raise ValueError(
        f"unknown variant {name!r}; {hint}The official ones: {', '.join(VARIANTS)}; of other "
        f"blocks: {', '.join(FAMILY)}"
    )
