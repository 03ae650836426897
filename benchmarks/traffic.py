"""How often a network goes through memory, counted by the compiler, without hardware.

Compiles train steps, stages and deployed networks ahead of time for one TPU
(`pip install -r requirements-tpu.txt`) or one NVIDIA GPU (`requirements-cuda.txt`; no GPU needed)
and prints the compiler's counts: bytes accessed, passes per block (bytes over the size of one
activation, over the blocks), kernels, FLOPs, memory, and how long compiling took.
Ours in both train forms beside a plain Flax version (`plain.py`), each with the compiler as it is
and with `config.train.compiler_options` (`docs/covariance.md`).

    python benchmarks/traffic.py                       # the stage and A0
    python benchmarks/traffic.py --models A0 B1 --forms plain covariance --write
    python benchmarks/traffic.py --target h100 --models A0 B1 B1g4 --kinds
    python benchmarks/traffic.py --target h100 --models A0 B1 --no-stage \
        --forms deploy "deploy stored" "deploy constant"

Three counts of bytes, none of them a time. "GB" is the compiler's own total: it counts an
operand wherever it lies, and copies into the chip's fast memory (VMEM, 128 MiB) several times.
The other two are added up over the compiled program (`repvgg_jax.train.hlo`): "HBM GB" takes only
operands and results that lie in the main memory, so that what stays in VMEM costs nothing, and
"touched GB" takes those of all computations, wherever they lie, but no copies. All count arrays
with the padding of their layout: 48 channels take the room of 128. For GPUs XLA gives no total: all
three are what the kernels read and write, without regard to caches, and a kernel's bytes are those
of its operands and results. Nothing is tuned (that takes a GPU), so a library's algorithms are
XLA's first choice.

Of deployed networks, "least x" is the bytes over those of the feature maps, each written once and
read once, and of the parameters.
"""

import itertools
import json
import os
import time
from typing import Any

import harness
import numpy as np

from repvgg_jax.train import hlo
from repvgg_jax.train.settings import FEWER_COPIES, TrainSettings
from repvgg_jax.train.targets import Target

FORMS = ("plain", "branches", "covariance")
OPTIONS = ("covariance_pallas",)  # not timed, so by request only
DEPLOY_FORMS = ("deploy", "deploy stored", "deploy constant")


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one program in this process and returns the compiler's counts."""
    import jax

    device = Target.parse(job["target"]).devices()[0]
    lower = lower_stage
    if "model" in job:
        lower = lower_deploy if job["form"] in DEPLOY_FORMS else lower_model
    start = time.perf_counter()
    lowered = lower(job, jax.sharding.SingleDeviceSharding(device))
    traced = time.perf_counter()
    compiled = lowered.compile(compiler_options=job["options"])
    done = time.perf_counter()
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    text = compiled.as_text()
    traffic = hlo.count(text)
    if "dump" in job:
        with open(job["dump"], "w") as file:
            file.write(text)
    return {
        "gb": cost.get("bytes accessed", traffic.touched) / 1e9,
        "hbm_gb": traffic.hbm / 1e9,
        "touched_gb": traffic.touched / 1e9,
        "kernels": traffic.kernels,
        "kinds": traffic.kinds,
        "gflop": cost["flops"] / 1e9 if cost else None,
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


def lower_deploy(job: dict[str, Any], sharding: Any) -> Any:
    """The deployed network in bfloat16: logits of a batch of images.

    "deploy" takes the weights as an argument that lies in memory as arrays usually do, "deploy
    stored" as the compiler would have it, and "deploy constant" has them as constants.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout

    import repvgg_jax as rv

    model = rv.create_model(job["model"], deploy=True, dtype=jnp.bfloat16)
    size = job["image_size"]
    images = jax.ShapeDtypeStruct((job["batch"], size, size, 3), jnp.bfloat16, sharding=sharding)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), variables)
    if job["form"] == "deploy constant":
        rng = np.random.default_rng(0)
        values = jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), variables
        )
        return jax.jit(lambda images: model.apply(values, images)).lower(images)
    layout = Format(Layout.AUTO, sharding) if job["form"] == "deploy stored" else sharding
    return jax.jit(model.apply, in_shardings=(layout, sharding)).lower(variables, images)


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
    parser.add_argument("--forms", nargs="+", choices=FORMS + OPTIONS + DEPLOY_FORMS, default=FORMS)
    parser.add_argument(
        "--compiler-options",
        nargs="*",
        metavar="NAME=VALUE",
        help="of XLA, with which everything is compiled once more; nothing: it is not "
        f"(default: {FEWER_COPIES} for TPUs, nothing for GPUs)",
    )
    parser.add_argument(
        "--target", default="v5e:2x2", help="a TPU slice or a GPU, of which one chip is used"
    )
    parser.add_argument(
        "--batch", type=int, help="images per chip (default: 32 on TPUs, 256 on GPUs)"
    )
    parser.add_argument("--kinds", action="store_true", help="also list the kinds of kernels")
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
    try:
        target = Target.parse(args.target)
        target.check_installed()
    except ValueError as error:
        parser.error(str(error))
    on_tpu = target.platform == "tpu"
    args.batch = args.batch or (32 if on_tpu else 256)
    if args.compiler_options is None:
        args.compiler_options = [FEWER_COPIES] if on_tpu else []

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
            job = program | {"form": form, "options": options, "target": target.name}
            if args.dump:
                job["dump"] = os.path.abspath(args.dump)
            # libtpu serves one process at a time, and a compiler that fails takes its process
            # along: each program gets its own, one after the other.
            counts = harness.in_subprocess(
                __file__, job, timeout=args.timeout, **target.environment
            )
            baseline = baseline or (None if "error" in counts else counts)
            rows.append(_row(job, counts, baseline))
            print(json.dumps(rows[-1]), flush=True)
            if args.kinds:
                for kind, (number, size) in counts.get("kinds", {}).items():
                    print(f"  {size / 1e9:8.2f} GB in {number:4d}  {kind}", flush=True)
    harness.report(
        "traffic",
        rows,
        note=f"{__doc__}\nRatios are to a program's first row that compiled. bfloat16, batch "
        f"{args.batch}, {target.name}, compiled ahead of time. Options: "
        f"{', '.join(args.compiler_options) or 'none'}.",
        write=args.write,
    )


def _least(job: dict[str, Any]) -> float:
    """GB that a deployed network cannot do without."""
    from roofline import least_work

    return least_work(job["model"], job["batch"], job["image_size"], itemsize=2)[0] / 1e9


def _row(
    job: dict[str, Any], counts: dict[str, Any], baseline: dict[str, Any] | None
) -> dict[str, Any]:
    name = job.get("model") or "{blocks} x {channels} at {size}x{size}".format(**job)
    row = {"program": name, "form": job["form"], "options": "yes" if job["options"] else "no"}
    if "error" in counts:
        names = (
            *("GB", "passes", "HBM GB", "touched GB", "touched passes", "kernels", "GFLOP"),
            *("temp MiB", "peak MiB", "compile s", "bytes x", "HBM x", "touched x"),
            *("kernels x", "temp x", "peak x", "FLOP x", "least x"),
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
        "kernels": counts["kernels"],
        "GFLOP": counts["gflop"],
        "temp MiB": counts["temp_mib"],
        "peak MiB": counts["peak_mib"],
        "compile s": counts["compile_s"],
        "bytes x": counts["gb"] / baseline["gb"],
        "HBM x": counts["hbm_gb"] / baseline["hbm_gb"],
        "touched x": counts["touched_gb"] / baseline["touched_gb"],
        "kernels x": counts["kernels"] / baseline["kernels"],
        "temp x": counts["temp_mib"] / baseline["temp_mib"],
        "peak x": counts["peak_mib"] / baseline["peak_mib"],
        "FLOP x": counts["gflop"] / baseline["gflop"] if counts["gflop"] else None,
        "least x": counts["gb"] / _least(job) if job["form"] in DEPLOY_FORMS else None,
        "error": None,
    }


if __name__ == "__main__":
    main()
