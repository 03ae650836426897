"""Starting a segmenter from a classifier: its backbone takes the weights, the rest is new."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from repvgg_jax.text import first_few, plural
from repvgg_jax.variants import Variant
from repvgg_jax.weights import Weights, files, merge_weights
from repvgg_jax.weights.state_dict import find_state_dict
from repvgg_jax.weights.tensor import Shapes, read_float32


@dataclasses.dataclass(frozen=True)
class Started:
    """Variables of a segmenter to start training from, and where they are from.

    Attributes:
      variables: `{"params": …, "batch_stats": …}` of the segmenter.
      taken: modules whose weights were loaded, e.g. `backbone/stage3_block0`.
      replaced: modules that stay freshly initialized: pyramid, decoder and heads.
      unfused: whether the classifier was in deploy form and its blocks were split into branches.
      source: a description of the classifier.
    """

    variables: dict[str, Any]
    taken: tuple[str, ...]
    replaced: tuple[str, ...]
    unfused: bool
    source: str

    def __str__(self) -> str:
        branches = "; deploy form split into branches" if self.unfused else ""
        ends = f"{self.taken[0]} … {self.taken[-1]}"
        return (
            f"starting from {self.source}: took {plural(len(self.taken), 'block')} ({ends})"
            f"{branches}; freshly initialized: {first_few(self.replaced, 10)}"
        )


def start_from_classifier(
    loaded: Weights, fresh: Mapping[str, Any], *, variant: Variant | None = None
) -> Started:
    """Replaces a freshly initialized backbone by that of a classifier.

    Dilation changes neither names nor shapes, and blocks have an identity branch where the
    classifier's have one, so every weight but the classifier's head is taken.

    Args:
      loaded: a classifier of the same variant and epsilon, from `load_weights` or
        `load_pretrained`; the deploy form is unfused.
      fresh: `create_segmenter(…).init(…)`.
      variant: of the backbone, as in `merge_weights`.

    Raises:
      ValueError: `fresh` is not a segmenter in training form, or has another backbone; the message
        lists differences.
    """
    collections = ("params", "batch_stats")
    if not all("backbone" in fresh.get(collection, {}) for collection in collections):
        raise ValueError(
            "a segmenter starts in training form, but these variables have no backbone with "
            "batch_stats; build it with create_segmenter(…, deploy=False)"
        )
    backbone = {name: fresh[name]["backbone"] for name in collections}
    merged = merge_weights(loaded, backbone, variant=variant)
    variables = {
        **fresh,
        **{name: {**fresh[name], "backbone": merged.variables[name]} for name in collections},
    }
    return Started(
        variables=variables,
        taken=tuple(f"backbone/{name}" for name in merged.variables["params"]),
        replaced=tuple(name for name in fresh["params"] if name != "backbone"),
        unfused=merged.unfused,
        source=merged.source,
    )


_RESNET_KEYS = {
    r"(?:conv|bn)(?P<conv>[123])": "stem{conv}",
    r"layer(?P<stage>\d+)\.(?P<block>\d+)\.(?:conv|bn)(?P<conv>[123])": (
        "stage{stage}_block{block}/conv{conv}"
    ),
    r"layer(?P<stage>\d+)\.(?P<block>\d+)\.downsample\.[01]": (
        "stage{stage}_block{block}/shortcut"
    ),
}
_RESNET_LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def load_resnet(
    source: str | os.PathLike | Mapping[str, Any], *, variant: str, entry: str | None = None
) -> Weights:
    """Loads the convolutions of a ResNet with a deep stem, as hszhao/semseg names them.

    Such are its `resnet50_v2.pth` and `resnet101_v2.pth`, trained on ImageNet. The classifier is
    left out. `start_from_classifier` compares names and shapes with those of the segmenter.

    Args:
      source: a file, or a state dict of NumPy, JAX or PyTorch arrays, which may be inside other
        mappings; with or without the prefix `module.`.
      variant: its name, e.g. `ResNet-50`.
      entry: which state dict, as in `load_weights`.

    Raises:
      ValueError: not a readable file, keys of another network, or damaged arrays.
    """
    contents, where = files.contents_of(source)
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    try:
        state = find_state_dict(contents.value, entry, _has_resnet)
        unknown = list(state.others)
        for key, tensor in state.tensors.items():
            name = key.removeprefix("module.")
            if name.startswith("fc.") or name.endswith("num_batches_tracked"):
                continue
            path = _resnet_path(name, len(tensor.shape))
            if path is None:
                unknown.append(name)
                continue
            array = read_float32(tensor, key)
            leaves[path] = array.transpose(2, 3, 1, 0) if path[-1] == "kernel" else array
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if unknown or not leaves:
        raise ValueError(
            f"{where} is not a ResNet with a deep stem: it has {first_few(unknown) or 'no arrays'}"
        )
    return Weights(
        variant,
        False,
        unflatten_dict(leaves),
        num_classes=0,
        family="semseg",
        unused=state.beside,
        placeholders=contents.placeholders,
    )


def _has_resnet(shapes: Shapes) -> bool:
    """Whether there is any convolution of such a ResNet among these arrays."""
    return any(
        len(shape) == 4 and _resnet_path(key.removeprefix("module."), 4)
        for key, shape in shapes.items()
    )


def _resnet_path(key: str, axes: int) -> tuple[str, ...] | None:
    """Our path of an array with that many axes; None for one that no ResNet has."""
    module, _, leaf = key.rpartition(".")
    for pattern, place in _RESNET_KEYS.items():
        if found := re.fullmatch(pattern, module):
            numbers = {name: int(number) for name, number in found.groupdict().items()}
            if "conv" in numbers:
                numbers["conv"] -= 1
            at = place.format(**numbers).split("/")
            if axes == 4 and leaf == "weight":
                return ("params", *at, "conv_single", "kernel")
            if leaf in _RESNET_LEAVES and axes == 1:
                collection, name = _RESNET_LEAVES[leaf]
                return (collection, *at, "bn_single", name)
    return None
