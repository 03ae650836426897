"""Images a second of inference: deployed and training form, ours and PyTorch's.

Runners are timed in turn, A B C A B C …, each in its own process; ratios are to the first
one's median.
Ours runs in JAX and, where `repvgg_jax.export` and the runtime are installed, exported to
ONNX and run by onnxruntime and OpenVINO. "deploy plain" leaves every convolution to XLA
(`lowering="plain"`). In "deploy constant" and under `torch.compile` with freezing the weights are
constants of the program; "deploy measured" is "deploy constant" with `lowering="measured"`. On a
GPU everything is bfloat16, on a CPU float32. `--isa AVX2` limits JAX and PyTorch to what processors
without AVX-512 have; the other runtimes cannot be limited and are left out.

    python benchmarks/infer.py --models A0 B1 B1g4 --batch 1 8 32 --write
    python benchmarks/infer.py --runners deploy "torch compile" "timm compile" --batch 256
    python benchmarks/infer.py --isa AVX2 --runners "deploy constant" "torch compile"
"""

import multiprocessing
import os
import pathlib
import tempfile
import types
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import torch_peer

RUNNERS = (
    "deploy", "deploy constant", "deploy measured", "deploy plain", "train form",
    "onnxruntime", "openvino",
    "torch", "torch channels_last", "torch compile", "torch compile freezing",
    "torch train form", "timm channels_last", "timm compile",
)  # fmt: skip
ISAS = {
    "AVX2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
"""Instruction sets, and what limits XLA, PyTorch and the oneDNN inside PyTorch to them."""


def missing(kind: str) -> str | None:
    """The package that this runner needs and that is not installed."""
    if kind in ("onnxruntime", "openvino"):
        needed = ["onnx", kind]
        if not torch_peer.installed("repvgg_jax.export"):
            return "repvgg_jax.export"
    else:
        needed = [word for word in (kind.partition(" ")[0],) if word in ("torch", "timm")]
    return next((package for package in needed if not torch_peer.installed(package)), None)


def build(kind: str, name: str, images: np.ndarray) -> tuple[Callable[[], Any], None]:
    """`runner`, with no further fact about it."""
    return runner(kind, name, images), None


def runner(kind: str, name: str, images: np.ndarray) -> Callable[[], Any]:
    """A function that computes the logits of `images` and waits for them."""
    if kind.startswith(("torch", "timm")):
        import torch

        peer = torch_peer.build_timm if kind.startswith("timm") else torch_peer.build
        return torch_peer.predictor(
            peer(name, deploy="train form" not in kind),
            images,
            channels_last="channels_last" in kind or "compile" in kind,
            compile="compile" in kind,
            freezing="freezing" in kind,
            bf16=torch.cuda.is_available(),
        )
    if kind in ("onnxruntime", "openvino"):
        return exported(kind, name, images)
    import jax
    import jax.numpy as jnp

    import repvgg_jax as rv

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = rv.create_model(name, dtype=dtype)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    if kind != "train form":
        lowering = {"deploy plain": "plain", "deploy measured": "measured"}.get(kind, "auto")
        fused = model.fuse(variables)
        model, variables = model.clone(deploy=True, lowering=lowering), fused
    x = jax.device_put(images.astype(dtype))
    if kind in ("deploy constant", "deploy measured"):
        predict = jax.jit(lambda images: model.apply(variables, images))
        return lambda: jax.block_until_ready(predict(x))
    apply = jax.jit(model.apply)
    return lambda: jax.block_until_ready(apply(variables, x))


def exported(kind: str, name: str, images: np.ndarray) -> Callable[[], Any]:
    """The deployed network as ONNX in another runtime, in a process where JAX never ran.

    JAX's threads would stay beside the runtime's, who then takes 1.1 times as long. The images
    have the runtime's memory layout before the clock runs, like PyTorch's.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        writer = multiprocessing.get_context("spawn").Process(
            target=write_onnx, args=(name, path, images[:1])
        )
        writer.start()
        writer.join()
        run = open_onnx(kind, path)
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return lambda: run(nchw.transpose(0, 2, 3, 1))


def open_onnx(kind: str, path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """An ONNX file of NCHW `images` to `logits` in a runtime, as a function of NHWC images."""
    from repvgg_jax.export import get_format

    runtime = next(runtime for runtime in get_format("onnx").runtimes if runtime.name == kind)
    names = types.SimpleNamespace(
        input_name="images",
        outputs=("logits",),
        feature_maps=(),
        with_preprocessing=False,
        is_segmenter=False,
    )
    return runtime.open(path, names)  # type: ignore[arg-type]


def write_onnx(
    name: str, path: pathlib.Path, images: np.ndarray, dtype: str = "float32"
) -> np.ndarray:
    """A deployed network with random parameters as an ONNX file; returns its float32 logits."""
    import jax
    import jax.numpy as jnp

    import repvgg_jax as rv
    from repvgg_jax.export import Network, Normalize, get_format

    model = rv.create_model(name)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    unused = Normalize(mean=(0.0,), std=(1.0,))  # images are normalized already
    network = Network(model, model.fuse(variables), images=images, normalize=unused)
    get_format("onnx").write(network, path, dtype)
    return np.asarray(jax.jit(model.apply)(variables, images))


def main() -> None:
    """Measures what the flags select and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["A0"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--isa", choices=ISAS, help="the processor's own if not given")
    args = parser.parse_args()
    absent = {kind: package for kind in args.runners if (package := missing(kind))}
    if args.isa:
        os.environ |= ISAS[args.isa]
        absent |= {
            kind: f"{args.isa} to be its limit"
            for kind in args.runners
            if kind in ("onnxruntime", "openvino")
        }
    kinds = [kind for kind in args.runners if kind not in absent]
    rows = []
    for name in args.models:
        for batch in args.batch:
            shape = (batch, args.image_size, args.image_size, 3)
            images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            times, _ = harness.take_turns_apart(
                build, kinds, (name, images), rounds=args.rounds, seconds=0.2
            )
            took = {kind: harness.summary(times[kind]) for kind in times}
            rows += [
                {
                    "model": name,
                    "batch": batch,
                    "runner": kind,
                    "images/s": batch / took[kind]["median"],
                    **harness.milliseconds(took[kind]),
                    "time x": harness.ratio(took, kind, kinds[0]),
                }
                for kind in took
            ]
    harness.report(
        "infer",
        rows,
        note=__doc__ or "",
        write=args.write,
        image_size=args.image_size,
        rounds=args.rounds,
        isa=args.isa or "the processor's own",
        skipped=", ".join(f"{kind} (needs {package})" for kind, package in absent.items())
        or "none",
    )


if __name__ == "__main__":
    main()
