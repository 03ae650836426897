"""Shared by all benchmarks: versions and hardware, interleaved timing, tables, result files."""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The package need not be installed: it is in the parent directory.
sys.path.insert(1, str(pathlib.Path(__file__).parents[1]))

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "numpy",
    "libtpu", "jax-cuda12-plugin", "torch", "timm", "onnx", "onnxruntime", "openvino",
)  # fmt: skip
CRASHED = object()
PAUSE = 0.3  # seconds; idle threads of onnxruntime spin for 0.04


def peak_kib() -> int:
    """The most memory that this process has had resident, on Linux.

    That of `resource` includes the memory of the process that started this one.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def origin() -> dict[str, str | None]:
    """The date, and the commit of these sources.

    The commit ends with "+" if files differ from it; outside git it is None.
    """
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"date": date, "commit": None}
    return {"date": date, "commit": described.stdout.strip()}


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPU, and how busy the machine is."""
    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
        facts["gpu"] = listed.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        facts["gpu"] = None
    facts["load_average"] = [round(load, 2) for load in os.getloadavg()]
    return facts


def take_turns(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Times every run once per round, A B C A B C …, after a warm-up round.

    Noise that lasts longer than a round then hits all alike, and ratios within one call
    stay comparable on a busy machine.

    Args:
      runs: by name, what to time; each returns when its work is done.
      rounds: how many counted rounds.
      seconds: a run shorter than this is repeated until it takes as long; its mean counts.

    Returns:
      Seconds by name and round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(-1, rounds):
        for name, run in runs.items():
            took = _seconds(run, seconds)
            if counted >= 0:
                times[name].append(took)
    return times


def take_turns_apart(
    build: Callable[..., tuple[Callable[[], Any], float | None]],
    names: Sequence[str],
    arguments: tuple[Any, ...],
    *,
    rounds: int,
    seconds: float = 0.0,
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """`take_turns` with a process for each run, of which one works at a time.

    In one process, libraries would share the state of threads and allocator: on two cores a train
    step in JAX took 1.4 times as long in a process where PyTorch had run. Besides, a crash ends
    only its own process. During the pause between two runs the threads of the first stop waiting
    for more work. A repeated run is preceded by one that is not timed, since its threads and its
    memory have been idle, too.

    Args:
      build: called as build(name, *arguments) in the process, a function at the top level of
        a module; returns what to time and one fact about it, e.g. its memory.
      names: of the runs.
      arguments: sent to every process.
      rounds: as in `take_turns`.
      seconds: as in `take_turns`.

    Returns:
      Seconds by name and round, and the facts by name, of those runs that did not crash.
    """
    spawn = multiprocessing.get_context("spawn")
    workers, facts, times = {}, {}, {}
    try:
        for name in names:
            ours, theirs = spawn.Pipe()
            worker = spawn.Process(target=_serve, args=(theirs, build, name, arguments, seconds))
            worker.start()
            theirs.close()
            workers[name] = ours, worker
            facts[name], times[name] = _answer(name, ours), []
            workers = {name: pair for name, pair in workers.items() if facts[name] is not CRASHED}
        for counted in range(-1, rounds):
            for name, (pipe, _) in list(workers.items()):
                time.sleep(PAUSE)
                pipe.send("run")
                took = _answer(name, pipe)
                if took is CRASHED:
                    del workers[name]
                elif counted >= 0:
                    times[name].append(took)
    finally:
        for pipe, worker in workers.values():
            pipe.close()
            worker.join()
    return {name: times[name] for name in workers}, {name: facts[name] for name in workers}


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """A summary of seconds as cells of a table."""
    return {f"{name} ms": 1e3 * value for name, value in seconds.items()}


def ratio(took: Mapping[str, Mapping[str, float]], name: str, to: str) -> float | None:
    """Of two medians among summaries; None if the second is missing."""
    return took[name]["median"] / took[to]["median"] if to in took else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    if not rows:
        return "(nothing was measured)"
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of all benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="also save the results under benchmarks/results/"
    )
    return parser


def report(
    name: str, rows: Sequence[Mapping[str, Any]], *, note: str, write: bool, **details: Any
) -> None:
    """Prints the versions, the hardware and the table, and saves them if asked to.

    Args:
      name: of the benchmark; the file is benchmarks/results/NAME-DATE-DEVICE.md.
      rows: of the table.
      note: what was measured and how, for a reader who has only this.
      write: whether to save.
      **details: further facts, e.g. shapes.
    """
    facts = hardware()
    date = datetime.datetime.now(datetime.UTC)
    lines = [
        f"# {name}, {date:%Y-%m-%d %H:%M} UTC",
        "",
        note.strip(),
        "",
        *(f"- {key}: {_cell(value)}" for key, value in (facts | details).items()),
        f"- commit: {origin()['commit'] or 'none'}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in versions().items())}",
        "",
        table(rows),
        "",
    ]
    text = "\n".join(lines)
    print(text, flush=True)
    if write:
        from repvgg_jax.files import write_text

        device = "gpu" if facts["gpu"] else "cpu"
        path = RESULTS / f"{name}-{date:%Y%m%d-%H%M}-{device}.md"
        write_text(path, text)
        print(f"saved {path}", flush=True)


def in_subprocess(
    script: str, job: Mapping[str, Any], *, timeout: float, **environment: str
) -> dict[str, Any]:
    """Runs `script --job JSON` in a fresh process, and returns the JSON of its last line.

    Returns:
      What it printed, or {"error": …} if it failed or timed out.
    """
    command = [sys.executable, script, "--job", json.dumps(job)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    finally:
        if process.poll() is None:  # with the processes that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        lines = (stderr.strip() or stdout.strip() or "no output").splitlines()
        raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return {"error": f"exit {process.returncode}: {[*lines[-1:], *raised][-1][:300]}"}
    return json.loads(stdout.strip().splitlines()[-1])


def _serve(
    pipe: Any, build: Callable[..., Any], name: str, arguments: tuple[Any, ...], seconds: float
) -> None:
    """A worker of `take_turns_apart`: builds, then times a run per request."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share a GPU's memory
    run, fact = build(name, *arguments)
    pipe.send(fact)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        if seconds:
            run()
        pipe.send(_seconds(run, seconds))


def _answer(name: str, pipe: Any) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        print(f"{name}: its process ended; left out of the table", flush=True)
        return CRASHED


def _seconds(run: Callable[[], Any], least: float) -> float:
    """The mean time of runs that together take at least `least` seconds."""
    start, repeats = time.perf_counter(), 0
    while repeats == 0 or time.perf_counter() - start < least:
        run()
        repeats += 1
    return (time.perf_counter() - start) / repeats


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
