"""Random checkpoints for the tests of `repvgg_jax.weights`."""

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import repvgg_jax as rv
from repvgg_jax.weights.names import naming_for
from repvgg_jax.weights.tree import leaves

TINY = rv.Variant("tiny", (1, 2), (8, 12), stem_channels=4, se=rv.SqueezeExcite(4))
"""The smallest network with everything that timm and mmpretrain have names for."""

CLASSES = 5


def thin(variant: rv.Variant) -> rv.Variant:
    """The same blocks, groups, gates and heads with an eighth of the channels."""
    return dataclasses.replace(
        variant,
        channels=tuple(width // 8 for width in variant.channels),
        stem_channels=16,
    )


def random_weights(
    variant: rv.Variant,
    *,
    deploy: bool = False,
    num_classes: int = CLASSES,
    in_channels: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Variables of random numbers; variances are positive."""
    rng = np.random.default_rng(seed)
    return unflatten_dict(
        {
            leaf.path: rng.random(leaf.shape, np.float32)
            - (leaf.path[-1] != "var") * np.float32(0.5)
            for leaf in leaves(
                variant, deploy=deploy, num_classes=num_classes, in_channels=in_channels
            )
        }
    )


def has_names(family: str, variant: rv.Variant) -> bool:
    """Whether a family has names for a variant."""
    try:
        naming_for(family, variant)
    except ValueError:
        return False
    return True


def assert_identical(one: Any, other: Any) -> None:
    """The same names, dtypes and bits."""
    one, other = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert array.dtype == other[key].dtype, key
        np.testing.assert_array_equal(array, other[key], err_msg=key, strict=True)


def refusal(source: Any, **options: Any) -> str:
    """The message, of one line, with which `load_weights` refuses `source`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        rv.load_weights(source, **{"variant": TINY, **options})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    if isinstance(source, os.PathLike):
        assert message.startswith(str(source))
    return message
