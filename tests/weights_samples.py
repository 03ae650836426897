"""Random checkpoints for the tests of `repvgg_jax.weights`."""

import dataclasses
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import repvgg_jax as rv
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


def random_variables(
    variant: rv.Variant, *, deploy: bool = False, num_classes: int = CLASSES, seed: int = 0
) -> dict[str, Any]:
    """Variables of random numbers; variances are positive."""
    rng = np.random.default_rng(seed)
    return unflatten_dict(
        {
            leaf.path: rng.random(leaf.shape, np.float32)
            - (leaf.path[-1] != "var") * np.float32(0.5)
            for leaf in leaves(variant, deploy=deploy, num_classes=num_classes)
        }
    )


def assert_identical(one: Any, other: Any) -> None:
    """The same names, dtypes and bits."""
    one, other = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert array.dtype == other[key].dtype, key
        np.testing.assert_array_equal(array, other[key], err_msg=key, strict=True)
