"""What the header of our own `model.safetensors` says about the network in it."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from repvgg_jax import activations, files
from repvgg_jax.export.network import Network
from repvgg_jax.normalize import Normalize
from repvgg_jax.text import one_line
from repvgg_jax.typed import typed
from repvgg_jax.variants import VARIANTS, Variant


@dataclasses.dataclass(frozen=True)
class Description:
    """A header, read back.

    Attributes:
      variant: the architecture; None if it is not an official one and an older version wrote it.
      activation: of the blocks.
      image_shape: (height, width, channels).
      normalize: pixels to what the network takes.
      labels: class names by label; empty if unknown.
    """

    variant: Variant | None
    activation: Callable | None
    image_shape: tuple[int, int, int]
    normalize: Normalize
    labels: tuple[str, ...]


def model_header(network: Network) -> dict[str, str]:
    """What `Network.header` lacks to build the model again, for formats that hold its weights."""
    if not network.is_repvgg:  # only its user can build it
        return {}
    variant = network.model.variant
    if not isinstance(variant.block, str):  # nor a block that has no name
        return {}
    header = {}
    if VARIANTS.get(variant.name) != variant:
        header["architecture"] = json.dumps(variant.as_saved("deploy"), ensure_ascii=False)
    with contextlib.suppress(ValueError):  # one that `read_description` could not give back
        header["activation"] = activations.name_of(network.model.activation, variant.name) or "none"
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
            activation=activations.OR_NONE[None if activation == "none" else activation],
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
