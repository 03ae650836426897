"""Images a second and peak memory of a whole train step: ours, plain Flax, and PyTorch.

Forward, backward and SGD with momentum on random images that stay on the device. Every runner
is timed in turn, A B C A B C …, each in its own process; ratios are to the first one's median.
PyTorch's run where torch (and timm) are installed. On a GPU everything is bfloat16 with
float32 parameters, on a CPU float32.

    python benchmarks/train_step.py --models A0 --batch 32 --write
    python benchmarks/train_step.py --models A0 B0 B1 B1g4 B3 --batch 256 --rounds 7

Memory is XLA's own count for a compiled step, arguments and temporaries; PyTorch on a CPU
counts nothing, on a GPU its allocator's peak is printed.
"""

from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import torch_peer

RUNNERS = (
    "covariance", "branches", "plain",
    "torch", "torch channels_last", "torch compile", "timm channels_last compile",
)  # fmt: skip


def jax_runner(form: str, name: str, images: np.ndarray, labels: np.ndarray) -> tuple[Any, float]:
    """One step of ours or of the plain version, and its memory in MiB."""
    import jax
    import jax.numpy as jnp
    from plain import PlainRepVGG
    from step import init_state, make_step

    import repvgg_jax as rv

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    if form == "plain":
        model: Any = PlainRepVGG(name, dtype=dtype)
    else:
        model = rv.create_model(name, train_form=form, dtype=dtype)
    batch = jax.device_put((images.astype(dtype), labels))
    state = jax.jit(lambda images: init_state(model, images))(batch[0])
    step = jax.jit(make_step(model), donate_argnums=0).lower(state, batch).compile()
    memory = step.memory_analysis()
    held_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held = [state]

    def run() -> None:
        held[0], loss = step(held[0], batch)
        jax.block_until_ready((held[0], loss))

    return run, held_bytes / 2**20


def torch_runner(
    kind: str, name: str, images: np.ndarray, labels: np.ndarray
) -> Callable[[], None]:
    """One step of a PyTorch model."""
    import torch

    timm = kind.startswith("timm")
    model = (
        torch_peer.build_timm(name, deploy=False) if timm else torch_peer.build(name, deploy=False)
    )
    return torch_peer.trainer(
        model,
        images,
        labels,
        channels_last="channels_last" in kind,
        compile="compile" in kind,
        bf16=torch.cuda.is_available(),
    )


def runner(
    kind: str, name: str, images: np.ndarray, labels: np.ndarray
) -> tuple[Callable[[], None], float | None]:
    """One step of any kind, and its memory in MiB if known."""
    if kind.partition(" ")[0] not in ("torch", "timm"):
        return jax_runner(kind, name, images, labels)
    run = torch_runner(kind, name, images, labels)
    return run, torch_peer.peak_mib(run) if torch_peer.on_gpu() else None


def measure(
    name: str, batch: int, size: int, kinds: list[str], rounds: int
) -> list[dict[str, Any]]:
    """Rows of the table for one model and batch size."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, 1000, batch).astype(np.int32)
    times, memory = harness.take_turns_apart(runner, kinds, (name, images, labels), rounds=rounds)
    took = {kind: harness.summary(times[kind]) for kind in times}
    return [
        {
            "model": name,
            "batch": batch,
            "runner": kind,
            "images/s": batch / took[kind]["median"],
            "median s": took[kind]["median"],
            "min s": took[kind]["min"],
            "max s": took[kind]["max"],
            "time x": harness.ratio(took, kind, kinds[0]),
            "memory MiB": memory[kind],
        }
        for kind in took
    ]


def main() -> None:
    """Measures what the flags select and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["A0"])
    parser.add_argument("--batch", nargs="+", type=int, default=[32])
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS[:4]))
    args = parser.parse_args()
    present = {"torch": torch_peer.installed(), "timm": torch_peer.installed("timm")}
    kinds = [kind for kind in args.runners if present.get(kind.partition(" ")[0], True)]
    rows = []
    for name in args.models:
        for batch in args.batch:
            rows += measure(name, batch, args.image_size, kinds, args.rounds)
    skipped = sorted(set(args.runners) - set(kinds))
    harness.report(
        "train_step",
        rows,
        note=__doc__ or "",
        write=args.write,
        image_size=args.image_size,
        rounds=args.rounds,
        not_installed=", ".join(skipped) or "none",
    )


if __name__ == "__main__":
    main()
