"""Activations by the names that variants, deploy directories and exports have for them."""

import types
from collections.abc import Callable, Mapping

import jax

Function = Callable[[jax.Array], jax.Array]


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x * Phi(x)`; `nn.gelu` approximates it by default."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Function] = types.MappingProxyType(
    {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": gelu}
)
"""Activations by name, the values of `Variant.activation`."""

OR_NONE: Mapping[str | None, Function | None] = types.MappingProxyType(
    {None: None, **dict(ACTIVATIONS.items())}
)
"""`ACTIVATIONS`, and None for no activation."""


def name_of(function: Function | None, where: str) -> str | None:
    """The name of an activation; None for no activation.

    Raises:
      ValueError: it is not one of `ACTIVATIONS`; `where` is what has it.
    """
    for name, known in OR_NONE.items():
        if function is known:
            return name
    label = getattr(function, "__name__", function)
    raise ValueError(
        f"{where}: exports know the activations nn.relu, nn.silu, repvgg_jax.activations.gelu "
        f"and None, not {label}"
    )
