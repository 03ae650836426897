"""Small arrays: (G, channels), or a matrix for every group, (G, k, in / k, out / k)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.covariance.form import Form


def apply(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """Every group's x'M, (G, out)."""
    groups = matrices.shape[1]
    x = x.reshape(x.shape[0], groups, 1, -1)
    return flat(matmul(x, matrices))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of matrices; accelerators would multiply with fewer bits unless told otherwise."""
    return jnp.matmul(x, y, precision="highest")


def outer_small(form: Form, x: jax.Array, y: jax.Array) -> jax.Array:
    """Every group's x y'."""
    return in_groups(form, x)[..., :, None] * in_groups(form, y)[..., None, :]


def in_groups(form: Form, x: jax.Array) -> jax.Array:
    """Splits the last axis into channel groups, (…, k, channels / k)."""
    return x.reshape(*x.shape[:-1], form.groups, -1)


def diagonal(matrices: jax.Array) -> jax.Array:
    """Every group's diagonal, (G, channels)."""
    # A sum, which compilers attach to what is around it; `jnp.diagonal` gathers and scatters.
    on_it = jnp.eye(matrices.shape[-1], dtype=bool)
    return flat(jnp.where(on_it, matrices, 0).sum(axis=-1))


def on_diagonal(form: Form, values: jax.Array) -> jax.Array:
    """Every group's diagonal matrix of (G, channels)."""
    on_it = jnp.eye(values.shape[-1] // form.groups, dtype=bool)
    return jnp.where(on_it, in_groups(form, values)[..., None], 0)


def flat(x: jax.Array) -> jax.Array:
    """All axes after the first as one."""
    return x.reshape(x.shape[0], -1)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds to the values of `dtype` without changing the type; differentiates as x."""
    if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    # Not two conversions, which the compiler may drop.
    info = jnp.finfo(dtype)
    return x + lax.stop_gradient(lax.reduce_precision(x, info.nexp, info.nmant) - x)
