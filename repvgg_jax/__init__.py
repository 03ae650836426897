"""Structural re-parameterization in JAX and Flax: branches train, one convolution deploys."""

from typing import TYPE_CHECKING, Any

from repvgg_jax._version import __version__
from repvgg_jax.block import ReparamBlock, RepVGGBlock
from repvgg_jax.compiled import CompiledNetwork, compile_deployed
from repvgg_jax.costs import Cost, cost
from repvgg_jax.fuse_module import fuse_model
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.nnx import to_nnx
from repvgg_jax.reparam import fuse_linear, fuse_params, unfuse_params
from repvgg_jax.segmentation.network import Segmenter, create_segmenter
from repvgg_jax.variants import FAMILY, VARIANTS, Layer, SqueezeExcite, Variant, get_variant
from repvgg_jax.weights import (
    Weights,
    load_pretrained,
    load_scales,
    load_variables,
    load_weights,
    merge_weights,
    save_variables,
    save_weights,
    to_state_dict,
)

if TYPE_CHECKING:
    from repvgg_jax.convert.deployed import load_deployed

__all__ = [
    "FAMILY",
    "VARIANTS",
    "CompiledNetwork",
    "Cost",
    "Layer",
    "RepVGG",
    "RepVGGBlock",
    "ReparamBlock",
    "Segmenter",
    "SqueezeExcite",
    "Variant",
    "Weights",
    "__version__",
    "compile_deployed",
    "cost",
    "create_model",
    "create_segmenter",
    "fuse_linear",
    "fuse_model",
    "fuse_params",
    "get_variant",
    "load_deployed",
    "load_pretrained",
    "load_scales",
    "load_variables",
    "load_weights",
    "merge_weights",
    "save_variables",
    "save_weights",
    "to_nnx",
    "to_state_dict",
    "unfuse_params",
]


def __getattr__(name: str) -> Any:
    """Imports `load_deployed` when it is used: with it come packages that networks do not need."""
    if name == "load_deployed":
        from repvgg_jax.convert.deployed import load_deployed

        return load_deployed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
