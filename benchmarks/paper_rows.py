"""What is measured of one row of the paper's tables, in a process of its own.

A measurement runs a network in one framework, alternating with the row that speeds are relative to
in the same framework, so that what else the machine does hits both alike.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import harness
import infer
import numpy as np
import paper
import torch_peer
from baselines import Network, random_params

from repvgg_jax.text import one_line
from repvgg_jax.train.targets import Target

Run = Callable[[], Any]
RUNNERS = {
    "JAX": (),
    "JAX as trained": (),
    "onnxruntime": ("onnx", "onnxruntime"),
    "OpenVINO": ("onnx", "openvino"),
    "PyTorch": ("torch",),
    "PyTorch compiled": ("torch",),
}
"""Frameworks, and the packages that each needs."""
SEGMENTED = ("JAX", "JAX as trained")
"""Of Table 8: the network fused, and with its branches."""
ON_GPU = ("JAX", "PyTorch", "PyTorch compiled")
TARGETS = {"v5e": "v5e:2x2", "h100": "h100"}
"""What programs are compiled for ahead of time; of the TPU slice one chip is used."""


_VERSIONS = {
    "JAX": ("jax", "jaxlib", "flax"),
    "JAX as trained": ("jax", "jaxlib", "flax"),
    "onnxruntime": ("onnxruntime",),
    "OpenVINO": ("openvino",),
    "PyTorch": ("torch",),
    "PyTorch compiled": ("torch",),
    "v5e": ("jax", "jaxlib", "flax", "libtpu"),
    "h100": ("jax", "jaxlib", "flax"),
}


def versions(job: dict[str, Any]) -> dict[str, str]:
    """Versions of what a job's result depends on, of those installed."""
    wanted = ("python", *_VERSIONS[job.get("runner") or job["ahead"]])
    return {name: found for name, found in harness.versions().items() if name in wanted}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Times a row in one framework.

    Args:
      job: `table`, `row`, `runner`, `device` (cpu or gpu), `batch`, `dtype`, `image_size` (None
        for the network's own), `channels` (of Table 1), `rounds` and `seconds`.

    Returns:
      Summaries of images per second and of the ratio to the reference in the same round, and MiB
      of memory; or an error.
    """
    row, reference = job["row"], paper.TABLES[job["table"]].reference
    names = list(dict.fromkeys((row, reference)))
    times, memory = harness.take_turns_apart(
        build, names, (job,), rounds=job["rounds"], seconds=job["seconds"]
    )
    if not times.get(row):
        return {"error": "its process crashed"}
    if isinstance(memory[row], str):
        return {"error": memory[row]}
    found = {
        "images_per_second": harness.summary([job["batch"] / took for took in times[row]]),
        "memory_mib": memory[row],
    }
    if len(times.get(reference, ())) == len(times[row]) and not isinstance(memory[reference], str):
        pairs = zip(times[reference], times[row], strict=True)
        # Images may have other sizes, batches are equal: a ratio of times is one of images/s.
        found["ratio"] = harness.summary([theirs / ours for theirs, ours in pairs])
    return found


def build(row: str, job: dict[str, Any]) -> tuple[Run, float | str | None]:
    """What to time, run once, and the memory of this process or of the GPU in MiB.

    If it cannot be built or run, there is an error instead of the memory.
    """
    try:
        run = runner(row, job)
        run()
    except Exception as error:  # whatever a framework raises
        return (lambda: None), one_line(f"{type(error).__name__}: {error}")
    return run, _memory_mib(job)


def runner(row: str, job: dict[str, Any]) -> Run:
    """A function that computes the logits of a batch and waits for them."""
    kind = job["runner"]
    if job["table"] == "8":
        return _segmenter(row, job)
    network = paper.network_of(job["table"], row, channels=job["channels"])
    size = job["image_size"] or network.image_size
    params = random_params(network, image_size=size)
    shape = (job["batch"], size, size, network.channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    if kind == "JAX":
        return _in_jax(_module(row, network, job), {"params": params}, images, job)
    if kind.startswith("PyTorch"):
        from baselines import pytorch

        return torch_peer.predictor(
            pytorch.build(network, params),
            images,
            channels_last=True,
            compile=kind == "PyTorch compiled",
            bf16=job["dtype"] == "bfloat16",
        )
    return _exported(kind.lower(), network, params, images)


def missing(kind: str) -> str | None:
    """The first package that a runner needs and that is not installed."""
    return next((p for p in RUNNERS[kind] if not torch_peer.installed(p)), None)


def not_measurable(table: str, kind: str) -> str | None:
    """Why a runner cannot measure a table here; None if it can."""
    if package := missing(kind):
        return f"{package} is not installed"
    if table == "8":
        return None if kind in SEGMENTED else "segmenters are measured in JAX only"
    return "the form as trained is measured in Table 8" if kind == "JAX as trained" else None


def runners_of(table: str, device: str) -> tuple[str, ...]:
    """The frameworks that measure a table if none is asked for."""
    if table == "8":
        return SEGMENTED
    return (
        ON_GPU if device == "gpu" else tuple(kind for kind in RUNNERS if kind not in SEGMENTED[1:])
    )


def compile_ahead(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles a row's program for hardware that need not be there, and counts.

    Args:
      job: `table`, `row`, `ahead` (a key of `TARGETS`), `batch`, `dtype`, `image_size` and
        `channels`.

    Returns:
      Gigabytes that the program moves to and from main memory, its kernels, and how long compiling
      took.
    """
    import jax
    import jax.numpy as jnp

    from repvgg_jax.train import hlo

    device = target_of(job["ahead"]).devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    dtype = jnp.dtype(job["dtype"])
    if job["table"] == "8":
        model, size, channels = segmenter_of(job["row"]), paper.SEGMENTED_SIZE, 3
    else:
        network = paper.network_of(job["table"], job["row"], channels=job["channels"])
        model = _module(job["row"], network, job)
        size, channels = network.image_size, network.channels
    size = job["image_size"] or size
    model, shape = model.clone(dtype=dtype), (job["batch"], size, size, channels)
    images = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(model.init, jax.random.key(0), images),
    )
    start = time.perf_counter()
    compiled = jax.jit(model.apply).lower(variables, images).compile()
    traffic = hlo.count(compiled.as_text())
    return {
        "gb": traffic.hbm / 1e9,
        "kernels": traffic.kernels,
        "compile_s": time.perf_counter() - start,
    }


def target_of(name: str) -> Target:
    """The devices that a key of `TARGETS` stands for."""
    return Target.parse(TARGETS[name])


def environment_ahead(job: dict[str, Any]) -> dict[str, str]:
    """What the process that compiles a row needs in its environment."""
    target = target_of(job["ahead"])
    if job["table"] != "8" or target.platform == "tpu":
        return target.environment
    # XLA chooses Triton for the matrix products that resize maps, finds no tiles for them without
    # tuning, and fails.
    flags = f"{target.environment['XLA_FLAGS']} --xla_gpu_enable_triton_gemm=false"
    return target.environment | {"XLA_FLAGS": flags}


def _module(row: str, network: Network, job: dict[str, Any]) -> Any:
    """A row as a Linen module in deploy form: an official variant is the library's own."""
    from baselines.linen import Baseline

    import repvgg_jax as rv

    variant = paper.variant_of(job["table"], row)
    return rv.create_model(variant, deploy=True) if variant else Baseline(network, deploy=True)


def _in_jax(model: Any, variables: Any, images: np.ndarray, job: dict[str, Any]) -> Run:
    import jax
    import jax.numpy as jnp

    model = model.clone(dtype=jnp.dtype(job["dtype"]))
    x = jax.device_put(images.astype(jnp.dtype(job["dtype"])))
    if job["device"] == "cpu":
        # As deployed on CPUs: XLA transforms constant kernels once, at compile time.
        predict = jax.jit(lambda images: model.apply(variables, images))
        return lambda: jax.block_until_ready(predict(x))
    apply, placed = jax.jit(model.apply), jax.device_put(variables)
    return lambda: jax.block_until_ready(apply(placed, x))


def _exported(kind: str, network: Network, params: Any, images: np.ndarray) -> Run:
    """The network as ONNX in another runtime, in a process where JAX never runs."""
    from baselines import graph

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        graph.write(network, params, path, images.shape[1])
        run = infer.open_onnx(kind, path)
    # The images have the runtime's memory layout before the clock runs, like PyTorch's.
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return lambda: run(nchw.transpose(0, 2, 3, 1))


def segmenter_of(row: str, *, deploy: bool = True) -> Any:
    """The PSPNet of a row of Table 8, without the head that only training runs."""
    import repvgg_jax as rv

    name, fast = row.removesuffix("-fast"), row.endswith("-fast")
    return rv.create_segmenter(name, num_classes=19, fast=fast, deploy=deploy, auxiliary_width=0)


def segmenter_cost(row: str, *, deploy: bool = True) -> dict[str, int]:
    """Parameters, MACs and Winograd multiplications of a row of Table 8 for one image.

    They are counted in the program, so MACs are those of convolutions.
    """
    import convolutions
    import jax

    model = segmenter_of(row, deploy=deploy).clone(lowering="plain")
    size = paper.SEGMENTED_SIZE
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    found = convolutions.count(model.apply, variables, images)
    return {
        "params": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "macs": found.macs,
        "winograd": found.winograd,
    }


def _segmenter(row: str, job: dict[str, Any]) -> Run:
    """Predicts with a PSPNet of Table 8 with random parameters."""
    import jax
    import jax.numpy as jnp

    size = job["image_size"] or paper.SEGMENTED_SIZE
    model = segmenter_of(row, deploy=job["runner"] == "JAX")
    images = np.random.default_rng(0).standard_normal((job["batch"], size, size, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(images))
    return _in_jax(model, variables, images, job)


def _memory_mib(job: dict[str, Any]) -> float | None:
    """The most memory on the GPU so far, or the resident size of this process."""
    if job["device"] == "gpu":
        if job["runner"] in SEGMENTED:
            import jax

            return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
