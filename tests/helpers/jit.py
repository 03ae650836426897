"""Compiling for tests."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

QUICK = ("xla_backend_optimization_level=0",)
"""The same for a training step, as `train__compiler_options`."""


def quick_jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` without the optimizations of the backend, which compiles two to four times faster.

    For tests of what is sampled or mixed, which take less time to run than to compile.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


@contextlib.contextmanager
def unoptimized() -> Iterator[None]:
    """A context in which everything compiles as in `quick_jit`, for code that is given."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
