"""How long exporting and proving takes, and how much memory: `python benchmarks/export.py`.

Every row is a process of its own, since memory is counted as the largest resident size of the
process, with Python, JAX, the network in memory, the writer and the runtimes that read the
artefact back. Weights are random, of a size that keeps activations sane; neither time nor
memory depends on their values.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import repvgg_jax as rv
from repvgg_jax.export import FORMATS, Metadata, Network, export

COLUMNS = ("variant", "format", "dtype", "params M", "MB", "seconds", "peak MiB", "relative")
PACKAGES = ("jax", "onnx", "onnxruntime", "openvino", "tensorflow-cpu", "ai-edge-litert", "numpy")


def main() -> None:
    """Prints the setting and one line for every variant, format and type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", default="A0,B1g4,B3,D2se")
    parser.add_argument("--formats", default="onnx", help=f"of {', '.join(FORMATS)}; or all")
    parser.add_argument("--dtypes", default="float32", help="types; a format skips what it lacks")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--images", type=int, default=8, help="that the proof runs on")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one.split(","), options.image_size, options.images)))
        return
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}")
    print(", ".join(f"{name} {version}" for name in PACKAGES if (version := installed(name))))
    print(f"images ({options.images}, {options.image_size}, {options.image_size}, 3), 1000 classes")
    formats = list(FORMATS) if options.formats == "all" else options.formats.split(",")
    print("".join(f"{column:>13}" for column in COLUMNS))
    for variant in options.variants.split(","):
        for name in formats:
            for dtype in options.dtypes.split(","):
                if dtype in FORMATS[name].dtypes:
                    row = run_alone(f"{variant},{name},{dtype}", options)
                    print("".join(f"{row[column]:>13}" for column in COLUMNS), flush=True)


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_alone(one: str, options: argparse.Namespace) -> dict[str, str | float]:
    """Measures one row in a fresh process."""
    command = [sys.executable, __file__, "--one", one]
    command += ["--image-size", str(options.image_size), "--images", str(options.images)]
    result = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout.splitlines()[-1])


def measure(
    variant: str, name: str, dtype: str, image_size: int, count: int
) -> dict[str, str | float]:
    """Exports one network; returns a row of the table, values by column."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, image_size, image_size, 3), np.uint8)
    model = rv.create_model(variant, deploy=True)
    params = random_params(model, rng)
    start = time.perf_counter()
    network = Network(
        model,
        {"params": params},
        images=images,
        metadata=Metadata((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, FORMATS[name].filename)
        artefact = export(name, network, path, dtype=dtype)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    million = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    worst = max((proof.relative for proof in artefact.proofs.values()), default=float("nan"))
    values = (
        *(variant, name, dtype, round(million, 2), round(artefact.size / 1e6, 1)),
        *(round(seconds, 1), round(peak), float(f"{worst:.1e}")),
    )
    return dict(zip(COLUMNS, values, strict=True))


def random_params(model: rv.RepVGG, rng: np.random.Generator) -> dict:
    """Deploy-form parameters under which activations keep their size from layer to layer."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= 0.1 if len(leaf.shape) == 1 else (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return values

    return jax.tree.map(draw, shapes)


if __name__ == "__main__":
    main()
