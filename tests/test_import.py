"""Importing the library brings in nothing that only training needs, and little at all."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "tensorflow", "tensorflow_datasets", "grain", "orbax", "sklearn", "ml_collections",
    "matplotlib", "torch", "safetensors", "huggingface_hub", "tensorboardX",
)  # fmt: skip

PROGRAM = f"""
import json, sys
import flax.linen, jax, jax.ad_checkpoint
before = set(sys.modules)
import repvgg_jax
added = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([
    sorted(added - set(sys.stdlib_module_names)),
    [name for name in {HEAVY!r} if name in sys.modules],
]))
"""


@pytest.mark.system
def test_import_is_light():
    """Beyond jax and Flax, which it cannot do without, only what Python brings."""
    added, heavy = json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True))
    assert added == ["repvgg_jax"]
    assert heavy == []
