"""Writes docs/models.md: every network, its costs, and what is published about it.

    python benchmarks/models_page.py

A test compares the page with what this writes.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import harness
import paper
from baselines import BASELINES, cost

from repvgg_jax import costs, variants
from repvgg_jax.costs import Cost
from repvgg_jax.files import write_text
from repvgg_jax.variants import get_variant
from repvgg_jax.weights.load import PRETRAINED

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
DIGESTS = ROOT / "tests" / "state_dict_digests.json"
README = "authors' README"
REPVIT = f"{README}: 300, 450 epochs, distilled"

INTRODUCTION = """\
# Models

Written by `python benchmarks/models_page.py` from the code. Parameters are exact: those that are
trained, without auxiliary classifiers (which the README's table counts for plus-L2pse), and those
of the deploy form. Multiply-accumulates (MACs) and Winograd multiplications (F(2x2, 3x3) for every
3x3 convolution of stride 1) are of one image in deploy form, at 224 pixels unless stated.
`rv.cost(name)` returns all of them for any size and number of classes.

Accuracies are top-1 in percent on ImageNet-1k, as published by others; none was measured here.
"""

CHECKPOINTS = """\
The last column says how reading the checkpoint is tested here. **Constructed**: the keys and
shapes of the whole network are those of the named project's own code (by SHA-256), and small files
with its keys load. Small models of the project itself, i.e. of RepVGG's authors, of timm
(RepVGG, MobileOne and RepViT) and of mmpretrain (RepVGG), give equal logits. mmpretrain's
MobileOne is tested by small files with its keys alone. Names under which a project has no network
are read as the others of its family. **Real** would be the published file; tests do not download,
so none was loaded.
"""

BASELINES_TEXT = """\
The networks that the paper compares with are in `benchmarks/baselines/`, built from the same
blocks, with batch normalization folded by `fuse_params`. They are not part of the package, and no
checkpoint of them is read. With random weights they have the logits of the timm models named
here. In ResNet-50, -101 and -152 the first 1x1 convolution of a stage takes the stride, as in the
original; so they have the MACs that the paper prints. In timm and torchvision the 3x3 does (4.1 G
for ResNet-50). `python benchmarks/paper_tables.py --table 4` measures all of them side by side.
"""


def published(name: str) -> tuple[str, str]:
    """Top-1 in percent as published, and where; dashes if it is not."""
    found = PUBLISHED.get(name)
    if found is not None:
        return found
    for table in ("5", "4"):
        if row := paper.TABLES[table].rows.get(name):
            return f"{row.accuracy:.2f}", f"paper, Table {table}"
    return "–", "–"


PUBLISHED: Mapping[str, tuple[str, str]] = {
    "B2g4": ("78.50, 79.38", "paper, Tables 4 and 5"),
    "D2se": ("83.55 at 320 pixels", README),
    "plus-L2pse": ("84.06 at 320 pixels", README),
    "mobileone_s0": ("71.40", "timm's results"),
    "mobileone_s1": ("75.76", "timm's results"),
    "mobileone_s2": ("77.50", "timm's results"),
    "mobileone_s3": ("78.00", "timm's results"),
    "mobileone_s4": ("79.45", "timm's results"),
    "qarepvgg_b0": ("74.78", "authors' log"),
    "repopt_b1": ("78.62", README),
    "repopt_b2": ("79.68", README),
    "repopt_l1": ("79.82", README),
    "repopt_l2": ("80.47", README),
    "repvit_m0_6": ("74.1", f"{README}: 300 epochs, distilled"),
    "repvit_m0_9": ("78.7, 79.1", REPVIT),
    "repvit_m1_0": ("80.0, 80.3", REPVIT),
    "repvit_m1_1": ("80.7, 81.2", REPVIT),
    "repvit_m1_5": ("82.3, 82.5", REPVIT),
    "repvit_m2_3": ("83.3, 83.7", REPVIT),
}
"""What the paper's Tables 4 and 5 do not say."""

FAMILIES: Mapping[str, tuple[str, str]] = {
    "": ("RepVGG", "https://github.com/DingXiaoH/RepVGG"),
    "mobileone": ("MobileOne", "https://github.com/apple/ml-mobileone"),
    "qarepvgg": ("QARepVGG", "https://github.com/cxxgtxy/QARepVGG"),
    "repopt": ("RepOpt-VGG", "https://github.com/DingXiaoH/RepOptimizers"),
    "repvit": ("RepViT", "https://github.com/THU-MIG/RepViT"),
}
"""By what their names start with: title, and where their authors publish weights."""


def page() -> str:
    """The page's text."""
    tested = tested_layouts()
    parts = [INTRODUCTION]
    families: dict[str, dict[str, Any]] = {"": dict(variants.VARIANTS)}
    for name, variant in variants.FAMILY.items():
        families.setdefault(name.partition("_")[0], {})[name] = variant
    for prefix, members in families.items():
        title, link = FAMILIES.get(prefix, (prefix, ""))
        rows = []
        for name in members:
            accuracy, source = published(name)
            hub = [key for key, variant in PRETRAINED.items() if variant == name]
            places = [f"[authors]({link})"] if link else []
            places += [f"hub: `{key}`" for key in hub]
            rows.append(
                _costs(name, costs.cost(name))
                | {
                    "top-1 %": accuracy,
                    "source": source,
                    "checkpoint": ", ".join(places) or "–",
                    "loaded in a test": _loaded(tested.get(name, ())),
                }
            )
        parts += [f"## {title}\n", harness.table(rows) + "\n"]
    parts += [CHECKPOINTS, "## Baselines\n", BASELINES_TEXT, harness.table(_baselines())]
    return "\n".join(parts) + "\n"


TIMM = {
    "ResNet-18": "resnet18",
    "ResNet-34": "resnet34",
    "ResNet-50": "resnet50",
    "ResNet-101": "resnet101",
    "ResNet-152": "resnet152",
    "ResNeXt-50": "resnext50_32x4d",
    "ResNeXt-101": "resnext101_32x4d",
    "VGG-16": "vgg16",
    "VGG-16-BN": "vgg16_bn",
    "EfficientNet-B0": "efficientnet_b0",
    "EfficientNet-B3": "efficientnet_b3",
    "RegNetX-3.2GF": "regnetx_032",
    "RegNetX-12GF": "regnetx_120",
}
"""Baselines in timm, which tests compare them with."""


def tested_layouts() -> dict[str, list[str]]:
    """By network, whose checkpoints' keys and shapes the tests compare with."""
    found: dict[str, list[str]] = {}
    for model in json.loads(DIGESTS.read_text()):
        family, name, _ = model.split("/")
        layouts = found.setdefault(get_variant(name.replace("RepVGGplus", "plus")).name, [])
        if family not in layouts:
            layouts.append(family)
    return found


def _loaded(layouts: Any) -> str:
    return f"constructed: {', '.join(layouts)}" if layouts else "not at all"


def _baselines() -> list[dict[str, Any]]:
    rows = []
    for name, network in BASELINES.items():
        accuracy, source = published(name)
        pixels = {"pixels": network.image_size, "top-1 %": accuracy, "source": source}
        rows.append(_costs(name, cost(network)) | pixels | {"timm": f"`{TIMM[name]}`"})
    return rows


def _costs(name: str, found: Cost) -> dict[str, Any]:
    return {
        "": name,
        "params trained": f"{found.params_train:,}",
        "params deployed": f"{found.params_deploy:,}",
        "G MACs": f"{found.macs_deploy / 1e9:.3f}",
        "G Winograd": f"{found.winograd_muls / 1e9:.3f}",
    }


def main() -> None:
    """Writes the page."""
    write_text(PAGE, page())
    print(f"saved {PAGE}")


if __name__ == "__main__":
    main()
