"""Compiling for tests."""

from collections.abc import Callable
from typing import Any

import jax

QUICK = ("xla_backend_optimization_level=0",)
"""The same for a training step, as `train__compiler_options`."""


def quick_jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` without the optimizations of the backend, which compiles two to four times faster.

    For tests of what is sampled or mixed, which take less time to run than to compile.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)
