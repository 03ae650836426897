"""`load_weights`: a checkpoint of whichever project becomes variables of ours."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from repvgg_jax.variants import Variant, get_variant
from repvgg_jax.weights import files
from repvgg_jax.weights.names import Entry
from repvgg_jax.weights.recognise import Recognised, recognise, unwrap
from repvgg_jax.weights.tensor import Tensor, load


@dataclasses.dataclass(frozen=True)
class Weights:
    """A loaded checkpoint.

    Attributes:
      variant: the architecture's canonical name, `B1g4`.
      deploy: whether these are the variables of the fused form.
      variables: `{"params": …, "batch_stats": …}`, deploy form without the second; float32
        NumPy arrays under the names of `create_model(variant, deploy=deploy)`.
      num_classes: of the classifier; 0 where it was left out.
      family: whose names the checkpoint used: official, timm, mmpretrain or flax.
    """

    variant: str
    deploy: bool
    variables: dict[str, Any]
    num_classes: int
    family: str

    def __str__(self) -> str:
        form = "deploy" if self.deploy else "training"
        classes = f"{self.num_classes} classes" if self.num_classes else "no classifier"
        return f"{self.variant}, {form} form, {classes}, {self.family} names"


def load_weights(
    source: str | os.PathLike | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    variant: str | Variant | None = None,
    entry: str | None = None,
) -> Weights:
    """Loads a RepVGG checkpoint of the authors, timm, mmpretrain or this project.

    Family, variant and form are recognised from keys and shapes. Files are safetensors, `.npz`
    or `.pth`, told apart by their contents; `.pth` needs no PyTorch and runs no code.

    Args:
      source: a file, or a state dict of NumPy, JAX or PyTorch arrays; `state_dict`, `model`
        and `ema` around it and a prefix `module.` are seen through.
      num_classes: how many classes there must be; 0 loads the backbone only, without the
        classifier and auxiliary heads; None takes what is there.
      variant: the architecture it must be, also one of your own; None recognises the official
        ones.
      entry: the key of the state dict where a file holds several, `ema` say.

    Raises:
      ValueError: with one line. Not a readable file; a pickle that asks for anything but
        tensors; another network; missing, unexpected or misshaped arrays; NaN or infinite
        numbers, negative variances, integers where there should be weights; another number
        of classes.
    """
    if isinstance(source, Mapping):
        saved, where = source, "the state dict"
    else:
        saved, where = files.read(source), os.fspath(source)
    try:
        tensors = unwrap(saved, entry)
        found = recognise(
            {key: tensor.shape for key, tensor in tensors.items()},
            variant=None if variant is None else get_variant(variant),
        )
        _check_classes(found, num_classes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

    backbone_only = num_classes == 0
    leaves = {
        item.leaf.path: _read(item, tensors[item.key], where)
        for item in found.entries
        if item.leaf is not None and not (backbone_only and item.leaf.in_head)
    }
    return Weights(
        variant=found.variant.name,
        deploy=found.deploy,
        variables=unflatten_dict(leaves),
        num_classes=0 if backbone_only else found.num_classes,
        family=found.family,
    )


def _check_classes(found: Recognised, wanted: int | None) -> None:
    advice = (
        "num_classes=0 loads the backbone only, and merge_weights gives it the head of a "
        "freshly initialised model"
    )
    if not found.num_classes and wanted != 0:
        raise ValueError(f"{found.variant.name} without a classifier; {advice}")
    if wanted not in (None, 0, found.num_classes):
        raise ValueError(
            f"{found.variant.name} has {found.num_classes} classes, not {wanted}; {advice}"
        )


def _read(item: Entry, tensor: Tensor, where: str) -> np.ndarray:
    """One array in our layout, in memory of its own."""
    assert item.leaf is not None
    array = load(tensor, f"{where}: {item.key}")
    if item.leaf.path[-1] == "var" and array.min() < 0:
        raise ValueError(f"{where}: {item.key} goes down to {array.min():g}; no variance does")
    return np.array(item.to_ours(array), order="C", copy=True)
