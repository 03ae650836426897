"""How much faster int8 is than float32, in ONNX Runtime and OpenVINO.

    python benchmarks/quantization_speed.py --models A0 B1 B1g4 --batches 1 8 --write

Every network is written as `convert.py --quantize int8` writes it. All four of a row's group, two
runtimes with a float32 and an int8 file each, are measured in turns in processes of their own;
`x float32` is the speed relative to the same runtime's float32. `in float` counts layers that the
runtime computes in float although the file has them in int8. Weights are random: neither the time
nor the layers depend on their values.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
from export import random_params

import repvgg_jax as rv
from repvgg_jax.export import FORMATS, INT8_FORMATS, Network, Normalize
from repvgg_jax.export.int8 import float_layers
from repvgg_jax.quantization import TARGETS, Settings, quantize

DTYPES = ("float32", "int8")
RUNTIMES = ("onnxruntime", "openvino")
NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def main() -> None:
    """Measures what the flags select, and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["A0", "B1", "B1g4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="least time of a run")
    parser.add_argument("--target", choices=list(TARGETS), default="vnni")
    args = parser.parse_args()
    names = [f"{runtime} {dtype}" for runtime in RUNTIMES for dtype in DTYPES]
    rows = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as directory:
            left = write(model, args.image_size, args.target, directory)
            for batch in args.batches:
                times, _ = harness.take_turns_apart(
                    runner,
                    names,
                    (model, batch, args.image_size, directory),
                    rounds=args.rounds,
                    seconds=args.seconds,
                )
                took = {name: harness.summary(times[name]) for name in names if name in times}
                for name, found in took.items():
                    runtime, dtype = name.split()
                    slow = harness.ratio(took, f"{runtime} float32", name)
                    row = {"model": model, "batch": batch, "runtime": runtime, "dtype": dtype}
                    row |= harness.milliseconds(found)
                    row["images/s"] = batch / found["median"]
                    row["x float32"] = slow
                    row["in float"] = left[runtime] if dtype == "int8" else None
                    rows.append(row)
                    print(row, flush=True)
    harness.report(
        "quantization_speed",
        rows,
        note=__doc__ or "",
        write=args.write,
        image_size=args.image_size,
        rounds=args.rounds,
        target=args.target,
    )


def network(model: Any, params: Any, size: int) -> Network:
    """A network with one image."""
    images = np.zeros((1, size, size, 3), np.uint8)
    return Network(model, {"params": params}, images=images, normalize=NORMALIZE)


def write(name: str, size: int, target: str, directory: str) -> dict[str, str]:
    """Writes both files; returns by runtime how many layers of the int8 file it leaves in float."""
    rng = np.random.default_rng(0)
    model = rv.create_model(name, deploy=True)
    params = random_params(model, rng)
    images = rng.standard_normal((2, size, size, 3), np.float32)
    settings = Settings(target=target, calibrator="max", equalize=False, bias_correction=False)
    quantized = quantize(model, {"params": params}, images, settings)
    of_int8, path = network(model, quantized.params, size), pathlib.Path(directory)
    FORMATS["onnx"].write(network(model, params, size), path / "float32.onnx", "float32")
    INT8_FORMATS["onnx"].write(of_int8, quantized, path / "int8.onnx")
    left = {}
    for runtime in RUNTIMES:
        found = float_layers("onnx", runtime, path / "int8.onnx", of_int8, quantized)
        left[runtime] = f"{len(found)} of {len(quantized.plan.layers)}"
    return left


def runner(
    name: str, model: str, batch: int, size: int, directory: str
) -> tuple[Callable[[], Any], float | None]:
    """What to time in a process of its own: a runtime with one of the files."""
    runtime, dtype = name.split()
    (opened,) = (r for r in FORMATS["onnx"].runtimes if r.name == runtime)
    deployed = rv.create_model(model, deploy=True)
    about = network(deployed, random_params(deployed, np.random.default_rng(0)), size)
    run = opened.open(pathlib.Path(directory, f"{dtype}.onnx"), about)
    images = np.random.default_rng(1).standard_normal((batch, size, size, 3), np.float32)
    return lambda: run(images), None


if __name__ == "__main__":
    main()
