"""How long exporting and proving takes, and how much memory.

    python benchmarks/export.py --models A0 B1g4 B3 D2se --formats onnx --write

Every row is measured in its own process, since memory is the largest resident size of the process,
with Python, JAX, the network in memory, the writer and the runtimes that read the artifact back.
Weights are random, of a size that keeps activations in a normal range; neither time nor
memory depends on their values.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np

import repvgg_jax as rv
from repvgg_jax.export import FORMATS, Network, Normalize, export

COLUMNS = ("M params", "MB", "seconds", "peak MiB", "relative", "error")


def main() -> None:
    """Exports what the flags select, one process each, and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["A0", "B1g4", "B3", "D2se"])
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["onnx"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="a format skips others")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--images", type=int, default=8, help="that the proof runs on")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one row")
    parser.add_argument("--job", type=json.loads, help="internal: export this one here")
    args = parser.parse_args()
    if args.job is not None:
        print(json.dumps(export_job(args.job)))
        return
    rows = []
    for model in args.models:
        for name in args.formats:
            for dtype in filter(FORMATS[name].dtypes.__contains__, args.dtypes):
                asked = {"model": model, "format": name, "dtype": dtype}
                job = asked | {"image_size": args.image_size, "images": args.images}
                found = harness.in_subprocess(__file__, job, timeout=args.timeout)
                rows.append(asked | dict.fromkeys(COLUMNS) | found)
                print(json.dumps(rows[-1]), flush=True)
    harness.report(
        "export",
        rows,
        note=__doc__ or "",
        write=args.write,
        images=f"({args.images}, {args.image_size}, {args.image_size}, 3), 1000 classes",
    )


def export_job(job: dict[str, Any]) -> dict[str, float]:
    """Exports one network in this process."""
    rng = np.random.default_rng(0)
    shape = (job["images"], job["image_size"], job["image_size"], 3)
    images = rng.integers(0, 256, shape, np.uint8)
    model = rv.create_model(job["model"], deploy=True)
    params = random_params(model, rng)
    start = time.perf_counter()
    network = Network(
        model,
        {"params": params},
        images=images,
        normalize=Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, FORMATS[job["format"]].filename)
        artifact = export(job["format"], network, path, dtype=job["dtype"])
    return {
        "M params": sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6,
        "MB": artifact.size / 1e6,
        "seconds": time.perf_counter() - start,
        "peak MiB": harness.peak_kib() / 1024,
        "relative": max(
            (proof.relative for proof in artifact.proofs.values()),
            default=0.0 if artifact.identical else np.nan,
        ),
    }


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
