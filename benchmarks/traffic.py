"""How often a train step goes through memory, counted by the compiler, without hardware.

Compiles train steps and stages ahead of time for one TPU v5e chip (`pip install
-r requirements-tpu.txt`) and prints XLA's own counts: bytes accessed, passes per block (bytes over
the size of one activation, over the blocks), FLOPs, memory, and how long compiling took.
Ours in both train forms beside a plain Flax version (`plain.py`), each with the compiler as it is
and with `config.train.compiler_options` (`docs/covariance.md`).

    python benchmarks/traffic.py                       # the stage and A0
    python benchmarks/traffic.py --models A0 B1 --forms plain covariance --write

Three counts of bytes, none of them a time. "GB" is the compiler's own total: it counts an
operand wherever it lies, and copies into the chip's fast memory (VMEM, 128 MiB) several times.
The other two are added up over the compiled program (`hbm.py`): "HBM GB" takes only operands and
results that lie in the main memory, so that what stays in VMEM costs nothing, and "touched GB"
takes those of all computations, wherever they lie, but no copies. All count arrays with the padding
of their layout: 48 channels take the room of 128.
"""

import itertools
import json
import os
import time
from typing import Any

import harness
import hbm

from repvgg_jax.train.settings import FEWER_COPIES, TrainSettings

FORMS = ("plain", "branches", "covariance")


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one program in this process and returns the compiler's counts."""
    import jax
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    lower = lower_model if "model" in job else lower_stage
    start = time.perf_counter()
    lowered = lower(job, jax.sharding.SingleDeviceSharding(device))
    traced = time.perf_counter()
    compiled = lowered.compile(compiler_options=job["options"])
    done = time.perf_counter()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
    traffic = hbm.count(text)
    if "dump" in job:
        with open(job["dump"], "w") as file:
            file.write(text)
    return {
        "gb": cost["bytes accessed"] / 1e9,
        "hbm_gb": traffic.hbm / 1e9,
        "touched_gb": traffic.touched / 1e9,
        "gflop": cost["flops"] / 1e9,
        "temp_mib": memory.temp_size_in_bytes / 2**20,
        "peak_mib": memory.peak_memory_in_bytes / 2**20,
        "trace_s": traced - start,
        "compile_s": done - traced,
    }


def lower_model(job: dict[str, Any], sharding: Any) -> Any:
    """The whole train step of a model in bfloat16, its state donated."""
    import jax
    import jax.numpy as jnp
    from plain import PlainRepVGG
    from step import init_state, make_step

    import repvgg_jax as rv

    if job["form"] == "plain":
        model: Any = PlainRepVGG(job["model"], dtype=jnp.bfloat16)
    else:
        model = rv.create_model(job["model"], train_form=job["form"], dtype=jnp.bfloat16)
    size = job["image_size"]
    images = jax.ShapeDtypeStruct((job["batch"], size, size, 3), jnp.bfloat16, sharding=sharding)
    labels = jax.ShapeDtypeStruct((job["batch"],), jnp.int32, sharding=sharding)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda images: init_state(model, images), images),
    )
    return jax.jit(make_step(model), donate_argnums=0).lower(state, (images, labels))


def lower_stage(job: dict[str, Any], sharding: Any) -> Any:
    """Forward and backward pass of a stack of equal blocks with identity, in bfloat16.

    How the arrays at its two ends lie in memory is left to the compiler, as it is inside a
    network.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout
    from plain import PlainBlock

    from repvgg_jax import RepVGGBlock
    from repvgg_jax.variants import Layer

    channels, size = job["channels"], job["size"]
    if job["form"] == "plain":
        layer = Layer("stage", channels, channels, 1, 1, 1, identity=True)
        block: Any = PlainBlock(layer, jnp.bfloat16)
    else:
        block = RepVGGBlock(channels, train_form=job["form"], dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((job["batch"], size, size, channels), jnp.bfloat16)
    variables = [jax.eval_shape(block.init, jax.random.key(0), x)] * job["blocks"]

    def stage(params: Any, x: jax.Array, stats: Any) -> tuple[jax.Array, Any]:
        new_stats = []
        for p, s in zip(params, stats, strict=True):
            both = {"params": p, "batch_stats": s}
            x, new = block.apply(both, x, train=True, mutable=["batch_stats"])
            new_stats.append(new["batch_stats"])
        return x, new_stats

    def run(params: Any, stats: Any, x: jax.Array, dy: jax.Array) -> Any:
        _, pull, stats = jax.vjp(lambda p, x: stage(p, x, stats), params, x, has_aux=True)
        dparams, dx = pull(dy)
        return dparams, stats, dx

    free = Format(Layout.AUTO, sharding)
    return jax.jit(
        run,
        in_shardings=(sharding, sharding, free, free),
        out_shardings=(sharding, sharding, free),
    ).lower([v["params"] for v in variables], [v["batch_stats"] for v in variables], x, x)


def activations(job: dict[str, Any]) -> float:
    """Bytes of every block's output in bfloat16, summed: one pass over all blocks."""
    if "model" not in job:
        return 2 * job["blocks"] * job["batch"] * job["size"] ** 2 * job["channels"]
    from repvgg_jax.variants import get_variant

    total, size = 0, job["image_size"]
    for layer in get_variant(job["model"]).layers():
        size = (size - 1) // layer.stride + 1
        total += 2 * job["batch"] * size**2 * layer.features
    return total


def main() -> None:
    """Compiles what the flags select, one process each, and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="*", default=["A0"], help="whole train steps")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument(
        "--compiler-options",
        nargs="*",
        default=[FEWER_COPIES],
        metavar="NAME=VALUE",
        help="of XLA, with which everything is compiled once more; nothing: it is not",
    )
    parser.add_argument("--batch", type=int, default=32, help="images per chip")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument(
        "--stage", nargs=3, type=int, default=(128, 56, 3), metavar=("CHANNELS", "SIZE", "BLOCKS")
    )
    parser.add_argument("--no-stage", action="store_true")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one program")
    parser.add_argument("--dump", help="write the last compiled program's text to this file")
    parser.add_argument("--job", type=json.loads, help="internal: compile this one here")
    args = parser.parse_args()
    if args.job is not None:
        print(json.dumps(compile_job(args.job)))
        return

    channels, size, blocks = args.stage
    programs: list[dict[str, Any]] = [
        {"model": model, "image_size": args.image_size, "batch": args.batch}
        for model in args.models
    ]
    if not args.no_stage:
        programs.insert(
            0, {"channels": channels, "size": size, "blocks": blocks, "batch": args.batch}
        )
    settings: list[dict[str, str]] = [{}]
    if args.compiler_options:
        settings.append(TrainSettings(compiler_options=tuple(args.compiler_options)).xla_options)
    rows = []
    for program in programs:
        baseline: dict[str, Any] | None = None
        for form, options in itertools.product(args.forms, settings):
            job = program | {"form": form, "options": options}
            if args.dump:
                job["dump"] = os.path.abspath(args.dump)
            # libtpu serves one process at a time, and a compiler that fails takes its process
            # along: each program gets its own, one after the other.
            counts = harness.in_subprocess(
                __file__, job, timeout=args.timeout, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1"
            )
            baseline = baseline or (None if "error" in counts else counts)
            rows.append(_row(job, counts, baseline))
            print(json.dumps(rows[-1]), flush=True)
    harness.report(
        "traffic",
        rows,
        note=f"{__doc__}\nRatios are to a program's first row that compiled. bfloat16, batch "
        f"{args.batch}, TPU v5e, compiled ahead of time. Options: "
        f"{', '.join(args.compiler_options) or 'none'}.",
        write=args.write,
    )


def _row(
    job: dict[str, Any], counts: dict[str, Any], baseline: dict[str, Any] | None
) -> dict[str, Any]:
    name = job.get("model") or "{blocks} x {channels} at {size}x{size}".format(**job)
    row = {"program": name, "form": job["form"], "options": "yes" if job["options"] else "no"}
    if "error" in counts:
        names = (
            *("GB", "passes", "HBM GB", "touched GB", "touched passes", "GFLOP", "temp MiB"),
            *("peak MiB", "compile s", "bytes x", "HBM x", "touched x", "peak x", "FLOP x"),
        )
        return row | dict.fromkeys(names) | {"error": counts["error"]}
    assert baseline is not None  # these counts, if there were none before
    one_pass = activations(job) / 1e9
    return row | {
        "GB": counts["gb"],
        "passes": counts["gb"] / one_pass,
        "HBM GB": counts["hbm_gb"],
        "touched GB": counts["touched_gb"],
        "touched passes": counts["touched_gb"] / one_pass,
        "GFLOP": counts["gflop"],
        "temp MiB": counts["temp_mib"],
        "peak MiB": counts["peak_mib"],
        "compile s": counts["compile_s"],
        "bytes x": counts["gb"] / baseline["gb"],
        "HBM x": counts["hbm_gb"] / baseline["hbm_gb"],
        "touched x": counts["touched_gb"] / baseline["touched_gb"],
        "peak x": counts["peak_mib"] / baseline["peak_mib"],
        "FLOP x": counts["gflop"] / baseline["gflop"],
        "error": None,
    }


if __name__ == "__main__":
    main()
