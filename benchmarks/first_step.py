"""Time from the start of `train.py` to its first finished step, without and with compiled programs.

Every turn starts the whole program twice on scikit-learn's digits: first with an empty
compilation cache, then with the one that the first start filled. The clock runs from before
the interpreter starts until step 1 is in `metrics.jsonl`; then the run is killed.

    python benchmarks/first_step.py --rounds 5 --write
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import harness

ROOT = pathlib.Path(__file__).resolve().parents[1]


def seconds_to_first_step(config: str, cache: str, timeout: float) -> float:
    """Seconds from the start of training with that compilation cache to the end of step 1."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        metrics = workdir / "metrics.jsonl"
        began = time.perf_counter()
        process = subprocess.Popen(
            [
                *(sys.executable, "train.py", "--config.report.every_steps=1"),
                *("--config", config, "--workdir", str(workdir)),
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit(f"train.py --config {config} ended without a step")
                if time.perf_counter() - began > timeout:
                    raise SystemExit(f"train.py --config {config}: no step in {timeout:.0f} s")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def main() -> None:
    """Measures and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one start")
    args = parser.parse_args()
    took: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for times in took.values():
                times.append(seconds_to_first_step(args.config, cache, args.timeout))
    base = harness.summary(took["first"])["median"]
    rows = []
    for start, times in took.items():
        summary = harness.summary(times)
        rows.append(
            {
                "config": args.config,
                "start": start,
                "median s": summary["median"],
                "min s": summary["min"],
                "max s": summary["max"],
                "time x": summary["median"] / base,
            }
        )
    harness.report("first_step", rows, note=__doc__ or "", write=args.write, rounds=args.rounds)


if __name__ == "__main__":
    main()
