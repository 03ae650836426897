"""Every test runs on eight CPU devices, and implicit rank promotion is an error."""

import atexit
import gc
import os
import shutil
import tempfile

from tests.helpers.flags import xla_flags
from tests.helpers.shared import digits_run, small_run  # noqa: F401, fixtures

# Before jax is imported: the number of devices is fixed when its backend starts. Flags given from
# outside stay, such as --xla_cpu_max_isa=AVX2.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
# Many tests, and the scripts that they start, run the same small program; compiling it once per
# session keeps them short. Workers inherit the directory; .ci/run names one for two sessions.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="repvgg_jax_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# As in `cli.run`: with Python's own thresholds, the garbage collector takes 7 % of the time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
