"""Importing the library is quick and brings in nothing that only training needs."""

import json
import statistics
import subprocess
import sys

HEAVY = (
    "tensorflow", "tensorflow_datasets", "grain", "orbax", "sklearn", "ml_collections",
    "matplotlib", "torch", "safetensors", "huggingface_hub", "tensorboardX",
)  # fmt: skip

PROGRAM = f"""
import json, sys, time
began = time.perf_counter()
import repvgg_jax
seconds = time.perf_counter() - began
print(json.dumps([seconds, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def test_import_is_light():
    found = [
        json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True))
        for _ in range(3)
    ]
    assert [heavy for _, heavy in found] == [[], [], []]
    assert statistics.median(seconds for seconds, _ in found) < 2.5
