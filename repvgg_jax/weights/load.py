"""Any project's checkpoint as variables, from a file or the hub; merging into other variables."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax.reparam import BUILT_IN, EPSILON, unfuse_params
from repvgg_jax.text import did_you_mean, first_few, how_to_install, one_line
from repvgg_jax.variants import ALL, Variant, get_variant
from repvgg_jax.weights import files
from repvgg_jax.weights.channels import adapt_channels
from repvgg_jax.weights.detect import (
    Detected,
    UnknownVariantError,
    detect,
    differences,
    has_blocks,
)
from repvgg_jax.weights.naming import Entry
from repvgg_jax.weights.state_dict import find_state_dict
from repvgg_jax.weights.tensor import Shapes, Tensor, read_float32
from repvgg_jax.weights.tree import head_width, in_head

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weights:
    """A loaded checkpoint.

    Attributes:
      variant: the canonical name of the architecture, e.g. `B1g4`.
      deploy: whether these are the variables of the fused form.
      variables: `{"params": …, "batch_stats": …}`, the deploy form without `batch_stats`;
        float32 NumPy arrays under the names of `create_model(variant, deploy=deploy)`.
      num_classes: width of the classifier; 0 if it was left out.
      family: the project whose names the checkpoint used: official, timm, mmpretrain or flax.
      in_channels: channels of the images.
      epsilon: of batch normalization, as given to `load_weights`; no checkpoint contains it.
        `create_model` and `fuse_params` need the same one.
      unused: what else was in the file, by key: a neck, another head, an optimizer, settings.
      placeholders: names of classes and functions in a `.pth` file; none of them was imported or
        called.
    """

    variant: str
    deploy: bool
    variables: dict[str, Any]
    num_classes: int
    family: str
    in_channels: int = 3
    epsilon: float = EPSILON
    unused: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()

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
    epsilon: float = EPSILON,
    allow_headless: bool = False,
    in_channels: int | None = None,
) -> Weights:
    """Loads a checkpoint of RepVGG or its family, by its authors, timm, mmpretrain or this project.

    Family, variant and form are detected from keys and shapes, the format of a file
    (safetensors, `.npz` or `.pth`) from its contents. `.pth` files are read without PyTorch
    and without running any code in them: whatever they hold beside tensors and plain containers
    is named in `Weights.placeholders` and otherwise ignored.

    Args:
      source: a file, or a state dict of NumPy, JAX or PyTorch arrays. The state dict may be
        inside other mappings, and its keys may have any prefix, e.g. `module.` or
        `model.backbone.`; keys of other networks beside it go to `Weights.unused`.
      num_classes: the expected number of classes; 0 loads the backbone only, without the
        classifier and auxiliary heads; None accepts any.
      variant: the expected architecture, which may be one of your own; None detects the
        official ones.
      entry: which one to load if a file contains several: the key of the state dict, e.g. `ema`
        or `ckpt/ema`, or the prefix of its keys, e.g. `teacher.`.
      epsilon: of the batch normalization that the checkpoint was trained with, e.g. 1e-3 for
        YOLO's; it is passed on as `Weights.epsilon`.
      allow_headless: with `num_classes=None`, also accept a checkpoint without a classifier.
      in_channels: channels of the images; None is the checkpoint's own. The kernels of the stem
        are adapted as timm does: for one channel they are summed over their channels, for n they
        are repeated in turn and scaled by own / n (`repvgg_jax.weights.channels`).

    Raises:
      ValueError: in one line. Not a readable file, or one that asks for more time or memory than
        weights need; another network; missing, unexpected or misshaped arrays; NaN or infinite
        elements, negative variances, integer weights; another number of classes.
    """
    if in_channels is not None and in_channels < 1:
        raise ValueError(f"in_channels={in_channels} must be 1 or more")
    contents, where = files.contents_of(source)
    own = None if variant is None else get_variant(variant)
    others: Mapping[str, str] = {}
    try:
        state = find_state_dict(contents.value, entry, lambda shapes: has_blocks(shapes, own))
        others = state.others
        found = detect(state.shapes, variant=own)
        unused = (*found.unused, *(f"{key} ({kind})" for key, kind in others.items()))
        _check_classes(found, num_classes, unused, allow_headless=allow_headless)
        arrays = {
            item.leaf.path: _read(item, state.tensors[found.prefix + item.key], found.prefix)
            for item in found.entries
            if item.leaf is not None and not (num_classes == 0 and item.leaf.in_head)
        }
        if in_channels is not None:
            arrays = adapt_channels(
                arrays,
                found.variant,
                deploy=found.deploy,
                taken=found.in_channels,
                channels=in_channels,
            )
    except UnknownVariantError as error:
        raise UnknownVariantError(f"{where}: {error}", error.architecture) from error
    except ValueError as error:
        # What stands where weights should be, e.g. a quantized tensor.
        kinds = [f"{key} is {kind}" for key, kind in others.items()]
        hint = f"; no arrays: {first_few(kinds)}" if kinds else ""
        raise ValueError(f"{where}: {error}{hint}") from error
    return Weights(
        variant=found.variant.name,
        deploy=found.deploy,
        variables=unflatten_dict(arrays),
        num_classes=0 if num_classes == 0 else found.num_classes,
        family=found.family,
        in_channels=in_channels or found.in_channels,
        epsilon=epsilon,
        unused=(*unused, *state.beside),
        placeholders=contents.placeholders,
    )


def _check_classes(
    found: Detected, wanted: int | None, unused: Sequence[str], *, allow_headless: bool
) -> None:
    advice = (
        "num_classes=0 loads the backbone only, and merge_weights adds the head of a freshly "
        "initialized model"
    )
    headless = wanted == 0 or (wanted is None and allow_headless)
    if not found.num_classes and not headless:
        beside = f", but there are {first_few(unused)}" if unused else ""
        raise ValueError(f"{found.variant.name} has no classifier{beside}; {advice}")
    if wanted not in (None, 0, found.num_classes):
        raise ValueError(
            f"{found.variant.name} has {found.num_classes} classes, not {wanted}; {advice}"
        )


def _read(item: Entry, tensor: Tensor, prefix: str) -> np.ndarray:
    """One array in our layout, as a copy."""
    assert item.leaf is not None
    array = read_float32(tensor, prefix + item.key)
    if item.leaf.path[-1] == "var" and array.min() < 0:
        raise ValueError(
            f"{prefix}{item.key} has a minimum of {array.min():g}; a variance is never negative"
        )
    return np.array(item.to_ours(array), order="C", copy=True)


@dataclasses.dataclass(frozen=True)
class Merged:
    """Variables to start training from, and how they were made.

    Attributes:
      variables: `{"params": …, "batch_stats": …}` with the names, shapes and dtypes of the
        fresh ones.
      replaced: paths of modules that stayed freshly initialized: the head if the number of
        classes differs, auxiliary heads that the checkpoint lacks.
      unfused: whether the checkpoint was in deploy form and its blocks were split into branches;
        warm up the learning rate in this case (see `unfuse_params`).
      source: a description of the checkpoint.
    """

    variables: dict[str, Any]
    replaced: tuple[str, ...]
    unfused: bool
    source: str

    def __str__(self) -> str:
        branches = "; deploy form split into branches" if self.unfused else ""
        fresh = f"; freshly initialized: {', '.join(self.replaced)}" if self.replaced else ""
        return f"starting from {self.source}{branches}{fresh}"


def merge_weights(
    loaded: Weights, fresh: Mapping[str, Any], *, variant: Variant | None = None
) -> Merged:
    """Replaces freshly initialized variables of the training form by loaded weights.

    The classifier and those of auxiliary heads stay fresh if the number of classes differs or
    the checkpoint has none. Everything else must have the same names and shapes.

    Args:
      loaded: from `load_weights` or `load_pretrained`; the deploy form is unfused.
      fresh: `create_model(…).init(…)` of the same variant and epsilon.
      variant: that `fresh` is of, if it is none of the official ones: it knows the blocks that a
        deploy form is unfused to.

    Raises:
      ValueError: `fresh` is in deploy form or another network; the message lists differences.
    """
    if "batch_stats" not in fresh:
        raise ValueError(
            "training starts from the training form, but the fresh variables have no "
            "batch_stats; build the model with deploy=False"
        )
    source, target = flatten_dict(loaded.variables), flatten_dict(fresh)
    replaced = _replaced(source, target, deploy=loaded.deploy)
    unfusable = {p[1] for p in target} - {p[1] for p in replaced} if loaded.deploy else set()
    merged = {
        # Heads that the fresh model does not have are dropped.
        path: leaf
        for path, leaf in source.items()
        if path not in replaced and (path in target or not in_head(path) or path[1] in unfusable)
    }
    kept = {path: leaf for path, leaf in target.items() if path in replaced}
    if loaded.deploy:
        # A head that stays fresh has no deploy form to be unfused from.
        deployed = unflatten_dict(merged)
        unfused = {p: np.asarray(v) for p, v in target.items() if p not in kept or p[1] != "head"}
        like = unflatten_dict(unfused)
        known = variant or ALL.get(loaded.variant)
        blocks = known.blocks if known else ()
        traceless = any(block.traceless for block in blocks)
        merged = flatten_dict(
            unfuse_params(
                deployed,
                like=like,
                epsilon=loaded.epsilon,
                blocks=(*BUILT_IN, *blocks),
                geometries=known.geometries(loaded.in_channels) if known and traceless else None,
            )
        )
    merged |= kept
    if any(wrong := differences(_shapes(target), _shapes(merged))):
        raise ValueError(f"{loaded} does not fit the model to initialize: {wrong}")
    variables = {
        path: leaf if path in kept else np.asarray(leaf).astype(target[path].dtype)
        for path, leaf in merged.items()
    }
    names = dict.fromkeys("/".join(path[1:-1]) for path in target if path in kept)
    return Merged(unflatten_dict(variables), tuple(names), loaded.deploy, str(loaded))


def _replaced(source: Mapping[Path, Any], target: Mapping[Path, Any], *, deploy: bool) -> set[Path]:
    """Paths of heads that the source lacks or has for another number of classes."""
    head = {path for path in target if path[1] == "head"}
    if deploy and head and not head <= source.keys():  # the head is a block
        widths = [head_width(leaves) for leaves in (source, target)]
        others = _replaced(source, {p: v for p, v in target.items() if p not in head}, deploy=True)
        return others if widths[0] == widths[1] else others | head
    fits = {p: p in source and source[p].shape == leaf.shape for p, leaf in target.items()}
    misfits = {path[1:-1] for path, fit in fits.items() if not fit and in_head(path)}
    return {path for path in target if path[1:-1] in misfits}


def _shapes(leaves: Mapping[Path, Any]) -> Shapes:
    return {"/".join(path): leaf.shape for path, leaf in leaves.items()}


_HUB_VARIANTS = ("A0", "A1", "A2", "B0", "B1", "B1g4", "B2", "B2g4", "B3", "B3g4", "D2se")
_HUB_REPVIT = ("m0_9", "m1_0", "m1_1", "m1_5", "m2_3")

PRETRAINED: Mapping[str, str] = MappingProxyType(
    {f"repvgg_{variant.lower()}.rvgg_in1k": variant for variant in _HUB_VARIANTS}
    | {f"mobileone_s{size}.apple_in1k": f"mobileone_s{size}" for size in range(5)}
    | {
        f"repvit_{size}.dist_{epochs}e_in1k": f"repvit_{size}"
        for epochs in (450, 300)
        for size in _HUB_REPVIT
    }
)
"""timm's names on the hub and their variants. Trained on ImageNet-1k by the authors."""

_HUB_FILE = "model.safetensors"


def load_pretrained(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Weights:
    """Loads one of `PRETRAINED` from the Hugging Face hub or its local cache.

    Args:
      name: `repvgg_b1g4.rvgg_in1k`; `repvgg_b1g4` and `timm/repvgg_b1g4.rvgg_in1k` mean the
        same. Of RepViT, names without a tag are those trained for 450 epochs.
      num_classes: as in `load_weights`; 0 loads the backbone only.
      in_channels: as in `load_weights`.
      revision: branch, tag or commit; None is the newest.
      cache_dir: directory of downloads; None is the hub's default (`HF_HOME`).

    Raises:
      ValueError: unknown name, `huggingface_hub` is not installed, neither cached nor
        downloadable, or as `load_weights`.
    """
    hub_name = _hub_name(name)
    path = _download(f"timm/{hub_name}", revision, cache_dir)
    variant = PRETRAINED[hub_name]
    return load_weights(path, num_classes=num_classes, variant=variant, in_channels=in_channels)


def is_pretrained(source: str) -> bool:
    """Whether `source` is a name that `load_pretrained` takes, and not a file."""
    return _find_hub_name(source) is not None and not os.path.exists(source)


def load_file_or_pretrained(
    source: str, *, variant: str | Variant | None = None, entry: str | None = None
) -> Weights:
    """`load_weights` for a file, `load_pretrained` for a name without a file of that name.

    A file without a classifier gives the backbone.

    Args:
      source: the file or the name, in every spelling that `load_pretrained` takes.
      variant: as in `load_weights`.
      entry: as in `load_weights`.

    Raises:
      ValueError: as they do; an entry of pretrained weights, which have only one.
    """
    if is_pretrained(source):
        if entry is not None:
            raise ValueError(f"{source} has no entry {entry!r}: it is a state dict")
        return load_pretrained(source)
    return load_weights(source, variant=variant, entry=entry, allow_headless=True)


def _find_hub_name(name: str) -> str | None:
    short = name.removeprefix("hf-hub:").removeprefix("timm/")
    return next((n for n in PRETRAINED if n == short or n.partition(".")[0] == short), None)


def _hub_name(name: str) -> str:
    found = _find_hub_name(name)
    if found is not None:
        return found
    short = name.removeprefix("hf-hub:").removeprefix("timm/")
    raise ValueError(
        f"unknown pretrained weights {name!r}; {did_you_mean(short, PRETRAINED, cutoff=0.6)}"
        f"choose from {', '.join(PRETRAINED)}"
    )


def _download(repository: str, revision: str | None, cache_dir: str | os.PathLike | None) -> str:
    """The local path of a repository's weights, downloaded if they are not in the cache."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils.logging
    except ImportError as error:
        raise ValueError(
            f"downloading {repository} needs huggingface_hub, which is not installed: "
            f"{how_to_install(extra='hub')}, or download the file and pass it to load_weights"
        ) from error
    try:
        with _quiet(huggingface_hub.utils.logging):
            return huggingface_hub.hf_hub_download(
                repository,
                _HUB_FILE,
                revision=revision,
                cache_dir=None if cache_dir is None else pathlib.Path(cache_dir),
            )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = one_line(next(iter(str(error).strip().splitlines()), ""))
        raise ValueError(
            f"{repository}/{_HUB_FILE} is not in the local cache and could not be downloaded "
            f"({type(error).__name__}: {reason}); connect once, or pass the file to load_weights"
        ) from error


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Suppresses the warnings of each attempt: the final error contains the reason."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
