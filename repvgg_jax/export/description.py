"""What the header of our own `model.safetensors` says about the network in it."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from repvgg_jax import activations, files
from repvgg_jax.export.network import Network
from repvgg_jax.normalize import Normalize
from repvgg_jax.text import one_line
from repvgg_jax.typed import typed
from repvgg_jax.variants import VARIANTS, Variant

_OTHER = "other"  # an activation that has no name


@dataclasses.dataclass(frozen=True)
class Description:
    """A header, read back.

    Attributes:
      variant: the architecture; None if it is not an official one and an older version wrote it.
      activation: of the blocks.
      image_shape: (height, width, channels).
      normalize: pixels to what the network takes.
      labels: class names by label; empty if unknown.
      has_other_activation: whether the blocks have an activation without a name, which the file
        cannot tell.
      crop: how evaluation crops image files; None if an older version wrote the file.
    """

    variant: Variant | None
    activation: Callable | None
    image_shape: tuple[int, int, int]
    normalize: Normalize
    labels: tuple[str, ...]
    has_other_activation: bool = False
    crop: Mapping[str, Any] | None = None


def model_header(network: Network) -> dict[str, str]:
    """What `Network.header` lacks to build the model again, for formats that hold its weights."""
    if not network.is_repvgg:  # only its user can build it
        return {}
    variant = network.model.variant
    if not isinstance(variant.block, str):  # nor a block that has no name
        return {}
    header = {} if network.crop is None else {"crop": json.dumps(network.crop)}
    if VARIANTS.get(variant.name) != variant:
        header["architecture"] = json.dumps(variant.as_saved("deploy"), ensure_ascii=False)
    try:
        header["activation"] = activations.name_of(network.model.activation, variant.name) or "none"
    except ValueError:
        header["activation"] = _OTHER
    return header


def read_description(path: str | os.PathLike) -> Description | None:
    """The header of a safetensors file that this package wrote; None for any other file.

    Raises:
      ValueError: the header is damaged.
    """
    header = _header(path)
    if header is None or "normalisation" not in header:
        return None
    try:
        given: dict[str, Any] = {
            name: files.parse_json(header[name])
            for name in ("image_size", "channels", "mean", "std", "labels")
        }
        fields = files.parse_json(header.get("architecture", "{}"))
        variant = (
            typed(Variant, fields, "architecture") if fields else VARIANTS.get(header["variant"])
        )
        height, width = typed(tuple[int, int], given["image_size"], "image_size")
        mean, std = (typed(tuple[float, ...], given[name], name) for name in ("mean", "std"))
        activation = header.get("activation", "relu")
        return Description(
            variant=variant,
            activation=None if activation in ("none", _OTHER) else activations.OR_NONE[activation],
            has_other_activation=activation == _OTHER,
            crop=typed(
                Mapping[str, Any] | None, files.parse_json(header.get("crop", "null")), "crop"
            ),
            image_shape=(height, width, typed(int, given["channels"], "channels")),
            normalize=Normalize(mean, std),
            labels=tuple(map(str, given["labels"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its header cannot be read: {one_line(error)}") from error


def _header(path: str | os.PathLike) -> dict[str, str] | None:
    import safetensors

    try:
        with files.open_regular(path) as file:
            if file.read(9)[8:] != b"{":
                return None
        with safetensors.safe_open(os.fspath(path), framework="np") as opened:
            return opened.metadata()
    except (OSError, safetensors.SafetensorError):
        return None  # whoever reads the weights says what is wrong
