"""The paper's tables in one run: parameters exact, speed side by side, on this machine.

    python benchmarks/paper_tables.py --counts --json counts.json    # seconds; nothing is timed
    python benchmarks/paper_tables.py --table 4                      # also 1, 5, 6 and 8
    python benchmarks/paper_tables.py --table 4 --rows A0 ResNet-18 --runners JAX onnxruntime

Batch normalization is folded in every network, as in the paper. Each measurement has a process of
its own and a time limit; one that fails is reported. Its network takes turns with the row that
speeds are relative to (ResNet-50 in Tables 4, 5 and 8) in the same framework. Images per second are
medians of the rounds, with the smallest and the largest; a ratio is the median of the ratios within
rounds. In JAX on CPUs the weights are constants of the program, as in the other frameworks that
compile. PyTorch is channels_last. Weights are random: times do not depend on their values.

On a CPU everything is float32 at batch 8; on a GPU float32 and bfloat16 at batch 128 and 256. Ahead
of time, each network is compiled for a TPU v5e and an H100 in bfloat16 at batch 128: gigabytes
moved to and from main memory, and kernels. Neither has to be there, but their compilers have to be
installed (requirements-tpu.txt, requirements-cuda.txt). Table 8, semantic segmentation, is in JAX
only, fused and with the branches as trained, at batch 1 on a CPU and at the paper's 16 on a GPU and
ahead of time; on a CPU, --image-size 257 takes an eighth of the time.

Results are kept in --output as they are found, and the same command continues where it stopped;
another folder starts anew. It writes a page of Markdown and the paper's figure, accuracy over
speed, in light and dark.
"""

import argparse
import itertools
import json
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import harness
import paper
import paper_report
import paper_rows
from baselines import BASELINES, cost

from repvgg_jax import VARIANTS
from repvgg_jax import cost as variant_cost
from repvgg_jax.files import write_text
from repvgg_jax.text import did_you_mean

Job = dict[str, Any]
BATCHES = {"cpu": (8,), "gpu": (128, 256), "ahead": (128,)}
SEGMENTED_BATCHES = {"cpu": (1,), "gpu": (16,), "ahead": (16,)}  # of Table 8
DTYPES = {"cpu": ("float32",), "gpu": ("float32", "bfloat16"), "ahead": ("bfloat16",)}
COUNTED = ("4", "5")  # tables of networks, which --counts is about
FOLDER = pathlib.Path("runs", "paper_tables")


def counts() -> dict[str, dict[str, int]]:
    """Parameters of both forms, MACs and Winograd multiplications of all networks by name."""
    found = {name: variant_cost(name) for name in VARIANTS}
    found |= {name: cost(network) for name, network in BASELINES.items()}
    return {
        name: {
            "params_train": each.params_train,
            "params_deploy": each.params_deploy,
            "macs": each.macs_deploy,
            "winograd_muls": each.winograd_muls,
            "image_size": BASELINES[name].image_size if name in BASELINES else 224,
        }
        for name, each in found.items()
    }


class Store:
    """Results by job, one line of JSON each, kept as they are found."""

    def __init__(self, folder: pathlib.Path, table: str):
        self.path = folder / f"table{table}.jsonl"
        self.machine = harness.hardware()
        self._found: dict[str, Job] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the process ended while it wrote this line
                    continue
                self._found[_key(record["job"])] = record

    def get(self, job: Job) -> Job | None:
        """The result of a job, if it is of these versions and, if timed, of this machine.

        A compiler or a framework that is not installed now does not make it invalid.
        """
        found = self._found.get(_key(job))
        if not found or not found["versions"].items() >= paper_rows.versions(job).items():
            return None
        parts = () if "ahead" in job else ("cpu", "cores", "gpu")
        return found if all(found["machine"][p] == self.machine[p] for p in parts) else None

    def has(self, job: Job) -> bool:
        """Whether a job is done; one that failed is tried again."""
        return "error" not in (self.get(job) or {"result": {"error": "none"}})["result"]

    def add(self, job: Job, result: Job) -> None:
        """Keeps a result."""
        record = {"job": job, "result": result, "versions": paper_rows.versions(job)}
        record |= harness.origin() | {"machine": harness.hardware()}
        self._found[_key(job)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps(record)}")  # an earlier line may be cut short


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def jobs_of(args: argparse.Namespace, rows: list[str], device: str) -> Iterator[Job]:
    """Everything that there is to measure and to compile, row by row."""
    batches = SEGMENTED_BATCHES if args.table == "8" else BATCHES
    cases = tuple(itertools.product(args.batch or batches[device], args.dtypes or DTYPES[device]))
    runners = paper_rows.runners_of(args.table, device) if args.runners is None else args.runners
    channels = args.channels or (paper.DENSITY_SHAPE[1] if device == "gpu" else 256)
    shared = {"table": args.table, "image_size": args.image_size, "channels": channels}
    timed = {"device": device, "rounds": args.rounds, "seconds": args.seconds}
    for row in rows:
        for (batch, dtype), runner in itertools.product(cases, runners):
            case = {"row": row, "batch": batch, "dtype": dtype, "runner": runner}
            yield shared | timed | case
        (batch,), (dtype,) = batches["ahead"], DTYPES["ahead"]
        for target in args.ahead:
            yield shared | {"row": row, "batch": batch, "dtype": dtype, "ahead": target}


def do(job: Job, timeout: float) -> Job:
    """The result of a job, or why there is none."""
    if "ahead" in job:
        try:
            paper_rows.target_of(job["ahead"]).check_installed()
        except ValueError as error:
            return {"error": str(error)}
        environment = paper_rows.environment_ahead(job)
        return harness.in_subprocess(__file__, job, timeout=timeout, **environment)
    if reason := paper_rows.not_measurable(job["table"], job["runner"]):
        return {"error": reason}
    on_cpu = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = on_cpu if job["device"] == "cpu" else {}
    return harness.in_subprocess(__file__, job, timeout=timeout, **environment)


def work(jobs: list[Job], store: Store, timeout: float) -> None:
    """Does what has no result yet, shows progress, and estimates the time that is left."""
    left = [job for job in jobs if not store.has(job)]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} results are there already", flush=True)
    began, done = time.monotonic(), 0.0
    weights = [_weight(job) for job in left]
    for number, (job, weight) in enumerate(zip(left, weights, strict=True), start=1):
        result = do(job, timeout)
        store.add(job, result)
        done += weight
        took = time.monotonic() - began
        remaining = took * (sum(weights) - done) / done
        print(
            f"[{number}/{len(left)}] {_title(job)}: {_summary(result)} "
            f"({_clock(took)}, about {_clock(remaining)} left)",
            flush=True,
        )


def _weight(job: Job) -> float:
    """How long a job takes, relative to others: mostly what is multiplied, and a fixed part."""
    if "ahead" in job or job["table"] == "8":
        return 10.0
    network = paper.network_of(job["table"], job["row"], channels=job["channels"])
    return 5 + cost(network, image_size=job["image_size"]).macs_deploy * job["batch"] / 1e10


def _title(job: Job) -> str:
    if "ahead" in job:
        return f"{job['row']}, compiled for {job['ahead']}"
    return f"{job['row']}, {job['runner']}, batch {job['batch']}, {job['dtype']}"


def _summary(result: Job) -> str:
    if "error" in result:
        return f"FAILED: {result['error']}"
    if "gb" in result:
        return f"{result['gb']:.2f} GB, {result['kernels']} kernels"
    ratio = f", {result['ratio']['median']:.2f} x the reference" if "ratio" in result else ""
    return f"{result['images_per_second']['median']:.4g} images/s{ratio}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def parse() -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=paper.TABLES, help="of the paper")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="by default all of the table")
    parser.add_argument(
        "--counts", action="store_true", help="count every network, or a table's; time nothing"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="of --counts")
    parser.add_argument(
        "--runners", nargs="*", choices=paper_rows.RUNNERS, metavar="NAME",
        help=f"frameworks, of {', '.join(paper_rows.RUNNERS)}, or nothing",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=_positive, help="images (default: see above)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--image-size", type=_positive, help="pixels, by default the paper's")
    parser.add_argument("--channels", type=_positive, help="of Table 1; 256 on CPUs, else 2048")
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--seconds", type=_seconds, default=0.2, help="the least for one round")
    parser.add_argument(
        "--ahead", nargs="*", choices=paper_rows.TARGETS, default=list(paper_rows.TARGETS),
        metavar="TARGET", help="compile for these ahead of time: v5e, h100 or nothing",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "gpu"), help="by default the GPU if present")
    parser.add_argument("--timeout", type=_seconds, default=1800, help="seconds per measurement")
    parser.add_argument("--output", type=pathlib.Path, help=f"a folder, by default {FOLDER}")
    parser.add_argument(
        "--write", action="store_true", help="keep results under benchmarks/results/paper_tables"
    )
    parser.add_argument(
        "--report", action="store_true", help="only write the page of what is there"
    )
    parser.add_argument("--job", type=json.loads, help="internal: measure this one here")
    args = parser.parse_args()
    if args.job is not None:
        return args
    if not args.counts and not args.table:
        parser.error("give --table NUMBER, --counts or both")
    if args.counts and args.table not in (None, *COUNTED):
        parser.error(f"--counts is of Tables {' and '.join(COUNTED)}, not of {args.table}")
    if args.json and not args.counts:
        parser.error("--json belongs to --counts")
    if args.table:
        known = paper.TABLES[args.table].rows
        names = {row.lower(): row for row in known}
        for index, row in enumerate(args.rows or ()):
            key = row.lower().removeprefix("repvgg-")
            if key not in names:
                hint = did_you_mean(row, known)
                parser.error(
                    f"Table {args.table} has no row {row!r}; {hint}It has: {', '.join(known)}"
                )
            args.rows[index] = names[key]
    args.output = args.output or (harness.RESULTS / "paper_tables" if args.write else FOLDER)
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more seconds")
    return number


def main() -> None:
    """Counts, or measures what the flags select and has no result yet, and reports."""
    args = parse()
    if args.job is not None:
        do_job = paper_rows.compile_ahead if "ahead" in args.job else paper_rows.measure
        print(json.dumps(do_job(args.job)))
        return
    run = count if args.counts else tabulate
    try:
        run(args)
    except OSError as error:
        raise SystemExit(f"error: {error}") from None


def count(args: argparse.Namespace) -> None:
    """Writes or prints the counts."""
    found = counts()
    if args.table:
        found = {row: found[row] for row in args.rows or paper.TABLES[args.table].rows}
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        write_text(args.json, text)
        print(f"saved {args.json}")
    else:
        print(text, end="")


def tabulate(args: argparse.Namespace) -> None:
    """Measures what the flags select and has no result yet, and writes the page."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, as Ctrl-C
    table = paper.TABLES[args.table]
    device = args.device or ("gpu" if harness.hardware()["gpu"] else "cpu")
    rows = [row for row in table.rows if row in (args.rows or table.rows)]
    jobs = list(jobs_of(args, rows, device))
    store = Store(args.output, args.table)
    try:
        if not args.report:
            work(jobs, store, args.timeout)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", flush=True)
    found = [record for job in jobs if (record := store.get(job))]
    page = paper_report.write(args.output, args.table, rows, found)
    print(f"{page.read_text()}\nsaved {page}", flush=True)


if __name__ == "__main__":
    main()
