"""The paper's tables as printed, and the networks that their rows are about.

RepVGG (Ding et al., CVPR 2021). Speeds are images per second on a 1080Ti in float32 (batch 128 and
224 pixels in Tables 4 and 5, batch 16 and 713 pixels in Table 8), batch normalization folded in
all networks.
"""

import dataclasses
from collections.abc import Mapping

from baselines import BASELINES, Network, from_variant, unconverted
from baselines.network import Average, Conv

from repvgg_jax import VARIANTS


@dataclasses.dataclass(frozen=True)
class Printed:
    """A row as the paper prints it; what it does not print is None.

    Attributes:
      accuracy: top-1 in percent on ImageNet; mIoU in percent on Cityscapes in Table 8.
      speed: images per second.
      params: million parameters, folded.
      macs: billion multiply-accumulates, which the paper calls FLOPs.
      winograd: billion multiplications with Winograd's algorithm where it was used.
      pixel_accuracy: in percent, of Table 8.
    """

    accuracy: float | None
    speed: float | None = None
    params: str | None = None
    macs: str | None = None
    winograd: str | None = None
    pixel_accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
      title: what it compares.
      rows: as printed, in the paper's order.
      reference: the row that speeds are relative to.
      measure: what the accuracy is.
    """

    title: str
    rows: Mapping[str, Printed]
    reference: str
    measure: str = "top-1 %"


TABLES: Mapping[str, Table] = {
    "1": Table(
        "Arithmetic density of convolutions by kernel size",
        dict.fromkeys(("1x1", "3x3", "5x5", "7x7"), Printed(None)),
        reference="3x3",
    ),
    "4": Table(
        "ImageNet, 120 epochs, simple augmentation",
        {
            "A0": Printed(72.41, 3256, "8.30", "1.4", "0.7"),
            "ResNet-18": Printed(71.16, 2442, "11.68", "1.8", "1.0"),
            "A1": Printed(74.46, 2339, "12.78", "2.4", "1.3"),
            "B0": Printed(75.14, 1817, "14.33", "3.1", "1.6"),
            "ResNet-34": Printed(74.17, 1419, "21.78", "3.7", "1.8"),
            "A2": Printed(76.48, 1322, "25.49", "5.1", "2.7"),
            "B1g4": Printed(77.58, 868, "36.12", "7.3", "3.9"),
            "EfficientNet-B0": Printed(75.11, 829, "5.26", "0.4", None),
            "B1g2": Printed(77.78, 792, "41.36", "8.8", "4.6"),
            "ResNet-50": Printed(76.31, 719, "25.53", "3.9", "2.8"),
            "B1": Printed(78.37, 685, "51.82", "11.8", "5.9"),
            "RegNetX-3.2GF": Printed(77.98, 671, "15.26", "3.2", "2.9"),
            "B2g4": Printed(78.50, 581, "55.77", "11.3", "6.0"),
            "ResNeXt-50": Printed(77.46, 484, "24.99", "4.2", "4.1"),
            "B2": Printed(78.78, 460, "80.31", "18.4", "9.1"),
            "ResNet-101": Printed(77.21, 430, "44.49", "7.6", "5.5"),
            "VGG-16": Printed(72.21, 415, "138.35", "15.5", "6.9"),
            "ResNet-152": Printed(77.78, 297, "60.11", "11.3", "8.1"),
            "ResNeXt-101": Printed(78.42, 295, "44.10", "8.0", "7.9"),
        },
        reference="ResNet-50",
    ),
    "5": Table(
        "ImageNet, 200 epochs, AutoAugment, label smoothing and mixup",
        {
            "B2g4": Printed(79.38, 581, "55.77", "11.3", "6.0"),
            "B3g4": Printed(80.21, 464, "75.62", "16.1", "8.4"),
            "B3": Printed(80.52, 363, "110.96", "26.2", "12.9"),
            "RegNetX-12GF": Printed(80.55, 277, "46.05", "12.1", "10.9"),
            "EfficientNet-B3": Printed(79.31, 224, "12.19", "1.8", None),
        },
        reference="ResNet-50",
    ),
    "6": Table(
        "Branches of B0, not converted: each with its batch normalization folded into it",
        {
            "B0 converted": Printed(75.14),
            "B0": Printed(75.14),
            "B0 without identity": Printed(73.15),
            "B0 without 1x1": Printed(74.79),
            "B0 without either": Printed(72.39),
        },
        reference="B0 converted",
    ),
    "8": Table(
        "Cityscapes, PSPNet",
        {
            "B1g2-fast": Printed(78.88, 10.9, pixel_accuracy=96.19),
            "ResNet-50": Printed(77.17, 10.4, pixel_accuracy=95.99),
            "B1g2": Printed(78.70, 8.0, pixel_accuracy=96.27),
            "B2-fast": Printed(79.52, 6.9, pixel_accuracy=96.36),
            "ResNet-101": Printed(78.51, 6.7, pixel_accuracy=96.30),
            "B2": Printed(80.57, 4.5, pixel_accuracy=96.50),
        },
        reference="ResNet-50",
        measure="mIoU %",
    ),
}

DENSITY: Mapping[str, tuple[float, float, float]] = {
    "1x1": (420.9, 84.5, 9.96),
    "3x3": (3788.1, 198.8, 38.10),
    "5x5": (10522.6, 2092.5, 10.57),
    "7x7": (20624.4, 4394.3, 9.38),
}
"""Table 1 as printed: billion multiply-accumulates, milliseconds, TFLOPS (two FLOP each)."""

DENSITY_SHAPE = (32, 2048, 56)
"""Of Table 1: images, channels in and out, pixels."""

SEGMENTED_SIZE = 713
"""Height and width of Table 8's images, in pixels."""

_BRANCHES = {
    "B0": {},
    "B0 without identity": {"identity": False},
    "B0 without 1x1": {"pointwise": False},
    "B0 without either": {"identity": False, "pointwise": False},
}


def network_of(table: str, row: str, *, channels: int = DENSITY_SHAPE[1]) -> Network:
    """The folded classifier of a row.

    Args:
      table: a key of `TABLES` other than "8", whose rows are segmenters.
      row: one of its rows, or its reference.
      channels: of Table 1.
    """
    if table == "1":
        conv = Conv("conv", channels, int(row[0]), activation=None, norm=False)
        return Network(row, (conv, Average()), DENSITY_SHAPE[2], channels)
    if table == "6" and row in _BRANCHES:
        return unconverted(VARIANTS["B0"], **_BRANCHES[row])
    name = row.removesuffix(" converted")
    return BASELINES[name] if name in BASELINES else from_variant(VARIANTS[name])


def variant_of(table: str, row: str) -> str | None:
    """The official variant that a row is, in deploy form; None for all others."""
    name = row.removesuffix(" converted")
    return name if name in VARIANTS and (table, row) != ("6", "B0") else None
