"""Everything worth knowing of one GPU, the most important first, in as many calls as it takes.

    python benchmarks/gpu.py --minutes 9

measures train steps of ours in every form, of plain Flax layers and of timm (batch 256), deployed
networks of ours, of timm and in onnxruntime (batches 1, 32 and 256), and the limits of the card, in
bfloat16 with float32 parameters in training. It needs jax for CUDA, flax and optax, and measures
PyTorch, timm and onnxruntime where they are installed; nothing for data or recipes. The same
command continues where the last one stopped. Every row is kept as soon as it is measured, in
`results/gpu-CARD.jsonl`, and the page `results/gpu-DATE-CARD.md` is written anew. Rows of another
card or of other versions are left alone.

Every row has its own process, and no two run at once. Its time is the median over rounds of at
least `--seconds`; calls are waited for in fives, at batch 1 one by one. Its error is the norm of
the difference to float32 on the CPU by the same library, relative to what that finds: of the
logits; in training of the loss and of the first update of all parameters. A batch repeats eight
images, so that its statistics and gradients are theirs, and the CPU needs to compute no more.
"GB counted" and "kernels" are those of the compiled program (`repvgg_jax.train.hlo`), "of
bandwidth" is that traffic over the time and the measured limit.

    python benchmarks/gpu.py --rows "train/B1/*" --again     # measure these anew
    python benchmarks/gpu.py --list                          # what there is, in this order
    python benchmarks/gpu.py --device cpu --rows "*/A0/8/*" --batch 8 --image-size 32   # a try
"""

import argparse
import datetime
import fnmatch
import json
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import harness
import torch_peer
from gpu_rows import Row, measure

_EXPLANATION = "".join(
    part.strip("\n").replace("measures train", "Measures train")
    for part in re.split(r"\n    python .*\n", __doc__ or "")[1:2]
)
LEAST = 40.0  # seconds that a row needs at least
VERSIONS = ("jax", "jaxlib", "flax", "torch", "timm", "onnxruntime")
_TRAIN = (
    "covariance",
    "timm compile channels_last",
    "branches",
    "plain",
    "covariance_pallas",
    "timm channels_last",
    "timm",
)
_DEPLOY = (
    "deploy stored", "timm compile channels_last", "deploy constant", "onnxruntime", "deploy",
)  # fmt: skip


def plan(batches: Sequence[int] = (256, 32, 1)) -> list[Row]:
    """All rows, the most important first; the first of `batches` is the one of training."""
    large, *smaller = batches
    rows = [Row("limits", "", 0, "jax")]
    for model in ("A0", "B1"):  # ours beside the strongest peer
        rows += [Row("train", model, large, runner) for runner in _TRAIN[:2]]
        rows += [Row("deploy", model, large, runner) for runner in _DEPLOY[:2]]
    for model in ("A0", "B1"):  # which form is best, against what
        rows += [Row("train", model, large, runner) for runner in _TRAIN[2:5]]
    for model in ("B0", "B1g4", "B3"):
        rows += [Row("train", model, large, runner) for runner in _TRAIN[:4]]
    for batch in smaller:
        for model in ("A0", "B1"):
            rows += [Row("deploy", model, batch, runner) for runner in _DEPLOY[:3]]
    models = ("A0", "B0", "B1", "B1g4", "B3")
    rows += [Row("train", model, large, runner) for runner in _TRAIN for model in models]
    rows += [
        Row("deploy", model, batch, runner)
        for runner in _DEPLOY
        for batch in batches
        for model in models
    ]
    return list(dict.fromkeys(rows))


def missing(row: Row) -> str | None:
    """The package that a row needs and that is not installed."""
    kind = row.runner.partition(" ")[0]
    needed = {"timm": ("torch", "timm"), "onnxruntime": ("onnx", "onnxruntime")}.get(kind, ())
    return next((name for name in needed if not torch_peer.installed(name)), None)


def card(device: str, timeout: float = 120) -> str:
    """The name of what is measured on, found in a process of its own.

    Raises:
      SystemExit: it is not there.
    """
    answer = harness.in_subprocess(
        __file__, {"probe": True}, timeout=timeout, **environment(device, None)
    )
    if "error" in answer:
        raise SystemExit(f"jax does not start here: {answer['error']}")
    if answer["platform"] != device:
        raise SystemExit(
            f"jax finds no GPU here, only {answer['kind']}; it needs the wheels of "
            "requirements-cuda.txt and NVIDIA's driver. --device cpu tries the benchmark out"
        )
    return answer["kind"]


def environment(device: str, cache: pathlib.Path | None) -> dict[str, str]:
    """Of the processes of rows. Compiled programs are kept for the next call."""
    variables = {}
    if device == "cpu":
        variables |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if cache is not None:
        variables |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        }
    return variables


class Store:
    """Rows on disk, of one card and one set of versions.

    Attributes:
      path: of the file that new rows are appended to.
      facts: what every row must agree with.
      rows: the newest of each name.
    """

    def __init__(self, folder: pathlib.Path, kind: str, size: int) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
        known = harness.versions()
        versions = {name: known.get(name) for name in VERSIONS}
        self.path = folder / f"gpu-{name}.jsonl"
        self.facts = {"card": kind, "image_size": size, "versions": versions}
        self.rows: dict[Row, dict[str, Any]] = {}
        for path in dict.fromkeys((harness.RESULTS / self.path.name, self.path)):
            for line in path.read_text().splitlines() if path.exists() else ():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # a call that was killed while it wrote
                if row | self.facts == row:
                    self.rows[Row.parse(row["row"])] = row

    def add(self, row: Row, found: Mapping[str, Any]) -> None:
        """Keeps a row."""
        entry = {"row": str(row), **self.facts, **harness.origin(), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.rows[row] = entry


def run(rows: Iterable[Row], store: Store, args: argparse.Namespace) -> None:
    """Measures rows until the time is up."""
    for row in rows:
        left = args.end - time.monotonic()
        if left < args.least:
            print(f"{args.minutes:g} minutes are nearly over; the same command continues")
            return
        began, limit = time.monotonic(), min(left, args.limit)
        job = {
            "row": row, "size": args.image_size, "rounds": args.rounds, "seconds": args.seconds,
        }  # fmt: skip
        found = harness.in_subprocess(
            __file__, job, timeout=limit, **environment(args.device, args.cache)
        )
        took = time.monotonic() - began
        if "error" in found and took >= limit and limit < args.limit:
            print(f"{row}: not done when the time was up; the same command tries it again")
            return
        store.add(row, found | {"took_s": round(took, 1)})
        print(f"{row}: {found.get('error') or _in_short(found)}, {took:.0f} s", flush=True)
        write_page(store, args)


def _in_short(found: Mapping[str, Any]) -> str:
    if "seconds" not in found:
        return f"{found['bandwidth'] / 1e9:.0f} GB/s, {found['arithmetic'] / 1e12:.1f} TFLOP/s"
    errors = ", ".join(f"{name} off by {error:.1g}" for name, error in found["errors"].items())
    return f"{1e3 * statistics.median(found['seconds']):.3g} ms, {errors}"


def cells(row: Row, found: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """A row of the page's table."""
    took = statistics.median(found["seconds"])
    best = {
        name: statistics.median(other["seconds"])
        for name, other in store.rows.items()
        if "error" not in other and name[:3] == row[:3]
    }
    peer = best.get(row._replace(runner="timm compile channels_last"))
    plain = best.get(row._replace(runner="plain"))
    return {
        "model": row.model,
        "batch": row.batch,
        "runner": row.runner,
        "images/s": row.batch / took,
        "median ms": 1e3 * took,
        "min ms": 1e3 * min(found["seconds"]),
        "max ms": 1e3 * max(found["seconds"]),
        "speed / timm compiled": peer / took if peer else None,
        "speed / plain": plain / took if plain else None,
        **{f"{name} off by": error for name, error in found["errors"].items()},
        "memory MiB": found.get("memory_mib"),
        "GB counted": found.get("gb"),
        "kernels": found.get("kernels"),
        **_shares(row, found, took, store),
        "ready s": found["ready_s"],
    }


def _shares(
    row: Row, found: Mapping[str, Any], took: float, store: Store
) -> dict[str, float | None]:
    """Of the card's limits: of memory by the traffic that is counted, and of arithmetic.

    Of deployed networks also the least time that either limit allows over the measured one.
    """
    import roofline

    import repvgg_jax as rv

    names = ("of bandwidth", "of arithmetic", *(["of roofline"] if row.task == "deploy" else []))
    limits = store.rows.get(Row("limits", "", 0, "jax"), {"error": ""})
    if "error" in limits:
        return dict.fromkeys(names)
    size = store.facts["image_size"]
    itemsize = 2 if store.facts["card"] != "cpu" else 4
    moved, flop = roofline.least_work(row.model, row.batch, size, itemsize)
    if row.task == "train":  # forward, and twice as much backward
        flop = 6 * row.batch * rv.cost(row.model, image_size=size).macs_train
    bandwidth, arithmetic = limits["bandwidth"], limits["arithmetic"]
    counted = found["gb"] * 1e9 / took / bandwidth if "gb" in found else None
    least = max(moved / bandwidth, flop / arithmetic)
    shares = (counted, flop / took / arithmetic, least / took)
    return dict(zip(names, shares, strict=False))


def write_page(store: Store, args: argparse.Namespace) -> pathlib.Path:
    """Writes what is known so far."""
    from repvgg_jax.files import write_text

    kind, order = store.facts["card"], plan(args.batches)
    order += [row for row in store.rows if row not in order]
    date = datetime.datetime.now(datetime.UTC)
    lines = [f"# {kind}, {date:%Y-%m-%d}", "", _EXPLANATION, ""]
    good = [row for row in order if "error" not in store.rows.get(row, {"error": ""})]
    for row in good:
        if row.task == "limits":
            found = store.rows[row]
            lines += [
                f"Limits: {found['bandwidth'] / 1e9:,.0f} GB/s (copy, read and written), "
                f"{found['arithmetic'] / 1e12:,.1f} TFLOP/s (matrix product).",
                "",
            ]
    for task, title in (("train", "Train step"), ("deploy", "Deployed")):
        rows = [cells(row, store.rows[row], store) for row in good if row.task == task]
        lines += [f"## {title}", "", harness.table(rows), ""] if rows else []
    failed = [row for row in order if row in store.rows and row not in good]
    lines += [f"- {row}: {store.rows[row]['error']}" for row in failed]
    left = [str(row) for row in order if row not in store.rows]
    lines += [f"- not measured yet: {len(left)} rows{', next ' + left[0] if left else ''}"]
    lines += [f"- {key}: {value}" for key, value in harness.hardware().items()]
    commits = sorted({store.rows[row]["commit"] or "none" for row in store.rows})
    lines += [f"- commit: {', '.join(commits)}", f"- images of {args.image_size} pixels"]
    lines += [f"- {key} {value}" for key, value in store.facts["versions"].items() if value]
    path = store.path.parent / f"gpu-{date:%Y%m%d}-{store.path.stem.removeprefix('gpu-')}.md"
    store.path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return path


def main() -> None:
    """Measures for some minutes what was not measured before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="how long to go on")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="of TASK/MODEL/BATCH/RUNNER")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    parser.add_argument("--list", action="store_true", help="print the rows and what is known")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[256, 32, 1],
        help="of deployed networks; the first is that of training",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of every round, at least")
    parser.add_argument("--limit", type=float, default=240, help="seconds for a row, at most")
    parser.add_argument(
        "--least", type=float, default=LEAST, help="seconds without which no row is started"
    )
    parser.add_argument("--output", type=pathlib.Path, default=harness.RESULTS)
    parser.add_argument(
        "--cache", type=pathlib.Path, help="of compiled programs",
        default=pathlib.Path(tempfile.gettempdir(), f"repvgg_jax-gpu-{os.getuid()}"),
    )  # fmt: skip
    parser.add_argument("--job", type=json.loads, help="internal: do this one here")
    args = parser.parse_args()
    args.end = time.monotonic() + 60 * args.minutes
    if args.job is not None:
        print(json.dumps(_work(args.job)))
        return
    kind = card(args.device)
    store = Store(args.output, kind, args.image_size)
    patterns = args.rows or ["*"]
    rows = [
        row for row in plan(args.batches)
        if any(fnmatch.fnmatch(str(row), pattern) for pattern in patterns)
    ]  # fmt: skip
    if args.list:
        for row in rows:
            found = store.rows.get(row)
            absent = missing(row)
            state = f"needs {absent}" if absent else "to do"
            print(f"{row}: {state if found is None else found.get('error') or _in_short(found)}")
        return
    todo = [row for row in rows if not missing(row) and (args.again or row not in store.rows)]
    run(todo, store, args)
    print(f"saved {write_page(store, args)}")


def _work(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    if "probe" in job:
        import jax

        device = jax.devices()[0]
        return {"platform": device.platform, "kind": device.device_kind}
    return measure(Row(*job["row"]), size=job["size"], rounds=job["rounds"], seconds=job["seconds"])


if __name__ == "__main__":
    main()
