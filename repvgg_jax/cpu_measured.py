"""Which way of computing a convolution is fastest on this machine's CPU, found by timing.

The table of `repvgg_jax.cpu_conv` was measured on two processors; others may differ. With
`lowering="measured"` every shape of a deployed network's convolutions is timed once, when it is
first traced, and the answers are kept on disk per machine. A machine that is busy gives wrong
answers; remove the file, `~/.cache/repvgg_jax/convolutions.json`, to have them again.
"""

import functools
import json
import logging
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from repvgg_jax.files import cache_directory, read_json, write_text

Convolution = Callable[[jax.Array, jax.Array], jax.Array]

_GAIN = 0.9  # of the time of the usual choice; what is closer to it is noise
_ROUNDS = 15
_SECONDS = 1.0  # for all rounds of one shape
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def fastest(
    key: str,
    candidates: Mapping[str, Convolution],
    usual: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> str:
    """The name of the fastest candidate, from the disk if it was timed before.

    Args:
      key: of the convolution: everything that its time depends on besides the machine.
      candidates: by name, functions of pixels and kernel in float32.
      usual: the one to take unless another is clearly faster.
      shapes: of pixels and kernel.
    """
    with _lock:
        path = _path()
        known = _read(path)
        name = known.get(machine(), {}).get(key)
        if name in candidates:
            return name
        name = _choose(times(candidates, shapes), usual)
        _log.info("convolution %s: %s is the fastest on this CPU", key, name)
        # Another process may have measured meanwhile.
        known = _read(path)
        known.setdefault(machine(), {})[key] = name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
        except OSError:
            _log.info("%s cannot be written; the next process measures again", path)
            _memory.setdefault(machine(), {})[key] = name
        return name


def times(
    candidates: Mapping[str, Convolution], shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> dict[str, float]:
    """The shortest time of each candidate in seconds, timed in turn.

    The kernel is a constant of the program, as in `rv.load_deployed`.
    """
    rng = np.random.default_rng(0)
    device = jax.devices("cpu")[0]
    pixels, kernel = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    like = jax.ShapeDtypeStruct(
        pixels.shape, pixels.dtype, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    found: dict[str, list[float]] = {name: [] for name in candidates}
    with jax.ensure_compile_time_eval():  # what calls this may be in the middle of tracing
        placed = jax.device_put(pixels, device)
        programs = {
            name: jax.jit(functools.partial(_with, convolution, kernel)).lower(like).compile()
            for name, convolution in candidates.items()
        }
        end = time.perf_counter() + _SECONDS
        for counted in range(-1, _ROUNDS):
            for name, program in programs.items():
                began = time.perf_counter()
                jax.block_until_ready(program(placed))
                if counted >= 0:
                    found[name].append(time.perf_counter() - began)
            if counted >= 0 and time.perf_counter() > end:
                break
    return {name: min(took) for name, took in found.items()}


def machine() -> str:
    """What the times depend on: the processor, its vector units, cores, and the compiler."""
    return _machine(os.environ.get("XLA_FLAGS", ""))


@functools.cache
def _machine(flags: str) -> str:
    name, units = platform.processor() or platform.machine(), ""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        title, _, value = line.partition(":")
        if title.strip() == "model name":
            name = value.strip()
        elif title.strip() in ("flags", "Features"):
            units = " ".join(sorted(word for word in value.split() if _is_vector_unit(word)))
            break
    isa = [flag for flag in flags.split() if flag.startswith("--xla_cpu")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join(filter(None, (name, units, f"{cores} cores", jax.__version__, *isa)))


def _is_vector_unit(flag: str) -> bool:
    return flag.startswith(("avx", "amx", "fma", "asimd", "sve"))


def _with(convolution: Convolution, kernel: np.ndarray, pixels: jax.Array) -> jax.Array:
    return convolution(pixels, jax.numpy.asarray(kernel))


def _choose(took: Mapping[str, float], usual: str) -> str:
    best = min(took, key=lambda name: took[name])
    return best if took[best] < _GAIN * took[usual] else usual


_memory: dict[str, dict[str, str]] = {}


def _path() -> pathlib.Path:
    # Without a directory it is one that can be neither read nor written.
    return (cache_directory() or pathlib.Path(os.devnull)) / "convolutions.json"


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What is on disk; a file that is damaged is as good as none."""
    try:
        found = read_json(path)
        return {name: dict(table) for name, table in found.items()} | _memory
    except (OSError, ValueError, AttributeError, TypeError):
        return {name: dict(table) for name, table in _memory.items()}
