"""`merge_weights`: where fine-tuning starts from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax.reparam import unfuse_params
from repvgg_jax.weights.differences import differences
from repvgg_jax.weights.loading import Weights
from repvgg_jax.weights.tree import in_head

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Merged:
    """Variables to start training from, and what was done to get them.

    Attributes:
      variables: `{"params": …, "batch_stats": …}` with the names, shapes and dtypes of the
        fresh ones.
      replaced: paths of what stayed freshly initialised: the head where the number of classes
        differs, auxiliary heads that the checkpoint lacks.
      unfused: whether the checkpoint was in deploy form and its blocks were split into three
        branches; warm up the learning rate then (see `unfuse_params`).
      source: the checkpoint, in words.
    """

    variables: dict[str, Any]
    replaced: tuple[str, ...]
    unfused: bool
    source: str

    def __str__(self) -> str:
        fresh = "nothing is fresh"
        if self.replaced:
            fresh = f"freshly initialised: {', '.join(self.replaced)}"
        branches = "; deploy form split into three branches" if self.unfused else ""
        return f"starting from {self.source}{branches}; {fresh}"


def merge_weights(loaded: Weights, fresh: Mapping[str, Any]) -> Merged:
    """Puts loaded weights into freshly initialised variables of the training form.

    The classifier, and those of auxiliary heads, stay fresh where the number of classes
    differs or the checkpoint has none. Everything else must fit, array by array.

    Args:
      loaded: from `load_weights` or `load_pretrained`; the deploy form is unfused.
      fresh: `create_model(…).init(…)` of the same variant.

    Raises:
      ValueError: `fresh` is in deploy form, or another network; the message lists what differs.
    """
    if "batch_stats" not in fresh:
        raise ValueError(
            "training starts from the training form, but the fresh variables have no "
            "batch_stats; build the model with deploy=False"
        )
    source, target = flatten_dict(loaded.variables), flatten_dict(fresh)
    replaced = _replaced(source, target)
    merged = {
        # Heads that the fresh model does not have are left behind.
        path: leaf
        for path, leaf in source.items()
        if path not in replaced and (path in target or not in_head(path))
    }
    kept = {path: leaf for path, leaf in target.items() if path in replaced}
    if loaded.deploy:
        deployed = unflatten_dict({**merged, **{p: v for p, v in kept.items() if p[1] == "head"}})
        merged = flatten_dict(unfuse_params(deployed, like=jax.tree.map(np.asarray, fresh)))
    else:
        merged |= kept
    if any(wrong := differences(_shapes(target), _shapes(merged))):
        raise ValueError(f"{loaded} does not fit the model that it should initialise: {wrong}")
    variables = {
        path: leaf if path in kept else np.asarray(leaf).astype(target[path].dtype)
        for path, leaf in merged.items()
    }
    names = dict.fromkeys("/".join(path[1:-1]) for path in target if path in kept)
    return Merged(unflatten_dict(variables), tuple(names), loaded.deploy, str(loaded))


def _replaced(source: Mapping[Path, Any], target: Mapping[Path, Any]) -> set[Path]:
    """The fresh arrays of heads that the source lacks or has for another number of classes."""
    fits = {p: p in source and source[p].shape == leaf.shape for p, leaf in target.items()}
    misfits = {path[1:-1] for path, fit in fits.items() if not fit and in_head(path)}
    return {path for path in target if path[1:-1] in misfits}


def _shapes(leaves: Mapping[Path, Any]) -> dict[str, tuple[int, ...]]:
    return {"/".join(path): leaf.shape for path, leaf in leaves.items()}
