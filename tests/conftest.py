"""Every test runs on eight CPU devices, and implicit rank promotion is an error."""

import os
import tempfile

# Before jax is imported: the number of devices is fixed when its backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests run the same small program; compiling it once a session keeps them short.
_CACHE = tempfile.TemporaryDirectory(prefix="repvgg_jax_xla_")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
