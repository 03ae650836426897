"""Time and memory of fusing a whole network's variables.

Fuses a variant's variables, NumPy arrays on the host as a checkpoint reader hands them over,
with `fuse_params`, and prints seconds and the peak of this process's resident memory, in
units of the training parameters' size. Two peaks:

- `added`: above what the process held with the variables loaded, that is what fusing needs;
- `total`: above what it held before they were loaded, so variables and results included.

    python benchmarks/fuse.py
    python benchmarks/fuse.py --models A0 B1 B3 --rounds 5 --write
"""

import json
import os
import threading
import time
from typing import Any

import harness


class PeakMemory:
    """The largest resident memory of this process while the block runs, in bytes.

    Sampled every millisecond by a thread; NumPy releases the interpreter while it computes.
    """

    def __enter__(self) -> "PeakMemory":
        self.peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, resident())

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, resident())


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuse_job(job: dict[str, Any]) -> dict[str, Any]:
    """Fuses once in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import repvgg_jax as rv

    model = rv.create_model(job["model"])
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    # A small network first: imports and allocators warm up on it.
    tiny = rv.create_model(rv.Variant("warm-up", (1,), (8,), 8), num_classes=2)
    rv.fuse_params(jax.tree.map(np.asarray, tiny.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))))

    before = resident()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32) + 0.5, shapes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    loaded = resident()
    with PeakMemory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        rv.fuse_params(variables)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parameters_mib": size / 2**20,
        "added": (memory.peak - loaded) / size,
        "total": (memory.peak - before) / size,
    }


def main() -> None:
    """Fuses every model in fresh processes and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["A0", "B1", "B3"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", type=json.loads, help="internal: fuse this one here")
    args = parser.parse_args()
    if args.job is not None:
        print(json.dumps(fuse_job(args.job)))
        return
    rows = []
    for model in args.models:
        runs = [
            harness.in_subprocess(__file__, {"model": model}, timeout=300, JAX_PLATFORMS="cpu")
            for _ in range(args.rounds)
        ]
        if errors := [run["error"] for run in runs if "error" in run]:
            raise SystemExit(f"{model}: {errors[0]}")
        seconds = harness.summary([run["seconds"] for run in runs])
        rows.append(
            {
                "model": model,
                "parameters MiB": runs[0]["parameters_mib"],
                "median s": seconds["median"],
                "min s": seconds["min"],
                "max s": seconds["max"],
                "median CPU s": harness.summary([run["cpu_seconds"] for run in runs])["median"],
                "added peak / parameters": max(run["added"] for run in runs),
                "total peak / parameters": max(run["total"] for run in runs),
            }
        )
    note = f"{__doc__}\nfloat32 variables; {args.rounds} fresh processes a row."
    harness.report("fuse", rows, note=note, write=args.write)


if __name__ == "__main__":
    main()
