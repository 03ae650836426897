"""Values of JSON files as typed values."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

import pytest

from repvgg_jax import VARIANTS, Variant
from repvgg_jax.typed import typed

OWN = Variant("own", (2, 1), ((8, 12), 16), 8, groups=(1, 4, 2), strides=(1, 2), dilation="timm")


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.5


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, 3, 3.0),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (int | None, None, None),
        (Literal["stage", "timm"], "timm", "timm"),
        (Mapping[str, Point], {"a": {"x": 1}}, {"a": Point(1)}),
        (tuple[Point, ...] | None, [{"x": 1, "y": 2}], (Point(1, 2.0),)),
    ],
)
def test_what_fits(kind, value, expected):
    assert typed(kind, value, "it") == expected


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "it=True must be an integer"),
        (int, 1.0, "it=1.0"),
        (float, 10**400, "too large"),
        (str, None, "must be a string"),
        (tuple[int, int], [1], "1 values, not 2"),
        (tuple[int, ...], "ab", "must be a list"),
        (Literal["stage", "timm"], "other", "it='other' must be one of 'stage', 'timm'"),
        (Literal[1, 2], True, "must be one of 1, 2"),
        (Point, {"x": 1, "z": 2}, "no field 'z'"),
        (Point, {"y": 1}, "lacks x"),
        (Mapping[str, Point], {"a": {"x": "1"}}, r"it\.a\.x='1' must be an integer"),
    ],
)
def test_what_does_not_fit(kind, value, message):
    with pytest.raises(ValueError, match=message):
        typed(kind, value, "it")


@pytest.mark.parametrize("variant", [*VARIANTS.values(), OWN], ids=lambda variant: variant.name)
def test_every_variant_is_read_back(variant):
    content = json.loads(json.dumps(dataclasses.asdict(variant)))
    assert typed(Variant, content, "variant") == variant
