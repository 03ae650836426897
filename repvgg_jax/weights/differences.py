"""What separates the arrays that are there from those that should be."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from repvgg_jax.weights.wording import some

Shapes = Mapping[str, tuple[int, ...]]


class Differences(NamedTuple):
    """Keys that are wrong, each with what is wrong about it.

    Attributes:
      missing: expected, not there.
      unexpected: there, not expected.
      misshaped: there, expected with another shape.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(
            f"{len(keys)} {what} {some(keys)}"
            for what, keys in zip(self._fields, self, strict=True)
            if keys
        )


def differences(
    expected: Shapes, found: Shapes, *, optional: Collection[str] = frozenset()
) -> Differences:
    """Compares two sets of arrays by key and shape; `optional` ones need not be there."""
    return Differences(
        missing=tuple(key for key in expected if key not in found and key not in optional),
        unexpected=tuple(key for key in found if key not in expected),
        misshaped=tuple(
            f"{key} {found[key]} instead of {shape}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ),
    )
