"""Ahead-of-time compilation of the train step for TPUs and GPUs that are not attached.

The compilers need no device (`repvgg_jax.train.targets`). They abort their process on failure, and
libtpu serves one program at a time, so each program is compiled in its own process:
`python -m repvgg_jax.train.aot`, with the job as JSON on standard input.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from repvgg_jax.data.dataset import BUILT_IN, Dataset, load
from repvgg_jax.data.settings import height_width
from repvgg_jax.data.sources import ArraySource
from repvgg_jax.train import hlo, resume
from repvgg_jax.train.experiment import Experiment, network_title
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import data_mesh
from repvgg_jax.train.targets import Target
from repvgg_jax.train.validate import check_batches, check_compiler_options

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler reports of a train step; all counts are per device and step.

    The compiler for GPUs counts neither arithmetic nor traffic: the former is then that of the
    program before it is optimized, the latter is added up over the compiled program
    (`repvgg_jax.train.hlo`).

    Attributes:
      title: what was compiled for what, in one line.
      batch: images per device, in one line.
      devices: number of devices.
      parameters: number of parameters.
      arguments: bytes of the state and the batch.
      temporaries: bytes that live within the step.
      peak: largest number of bytes in use.
      hbm: bytes of memory per device.
      flops: floating-point operations.
      accessed: bytes read and written.
      kernels: instructions that compute or copy.
      collectives: number of each kind.
      trace_seconds: tracing and lowering.
      compile_seconds: compiling.
    """

    title: str
    batch: str
    devices: int
    parameters: int
    arguments: int
    temporaries: int
    peak: int
    hbm: int
    flops: float
    accessed: float
    kernels: int
    collectives: dict[str, int]
    trace_seconds: float
    compile_seconds: float

    def __str__(self) -> str:
        """A table."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.collectives.items()))
        lines = {
            "memory, peak": f"{_mib(self.peak)} of {self.hbm / 2**30:.0f} GiB "
            f"({self.peak / self.hbm:.1%})",
            "  state and batch": _mib(self.arguments),
            "  temporaries": _mib(self.temporaries),
            "arithmetic": f"{self.flops / 1e9:,.1f} GFLOP",
            "memory traffic": f"{self.accessed / 1e9:,.2f} GB",
            "kernels": f"{self.kernels:,}",
            "collectives": kinds or "none",
            "compiled in": f"{self.compile_seconds:.1f} s, "
            f"after {self.trace_seconds:.1f} s of tracing",
        }
        table = "\n".join(f"{name:<18}{value}" for name, value in lines.items())
        return f"{self.title}\n{self.batch}\nper device and step:\n{table}"


def compile_ahead(config: ConfigDict | Settings, name: str, *, timeout: float) -> Program:
    """Compiles the train step that a configuration describes for devices that are not attached.

    No data are read: except for the built-in sources, images are taken to be ImageNet's.

    Args:
      config: complete; `config.train.batch_size` counts all devices together.
      name: the devices, as `Target.parse` takes it, e.g. `v5e:16x16` or `h100x8`.
      timeout: seconds after which to give up.

    Raises:
      ValueError: no such devices, no compiler, a setting that cannot work, or a program that
        does not fit the devices' memory.
      TimeoutError: it took too long.
      OSError: the compiler crashed.
    """
    target = Target.parse(name)
    target.check_installed()
    root = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    job = json.dumps({"config": Settings.from_config(config).as_json(), "target": name})
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=job,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": path, **target.environment},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(
            f"compiling for {name} was not finished after {timeout:.0f} s; raise --compile_timeout"
        ) from error
    if done.returncode:
        raise OSError(f"the compiler crashed on {name}: {_reason(done.returncode, done.stderr)}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return Program(**answer)


def _compile(settings: Settings, target: Target) -> Program:
    """Compiles in this process."""
    settings = resume.started(settings, target.platform)
    devices = target.devices()
    processes = len({device.process_index for device in devices})
    check_batches(settings, devices=len(devices), processes=processes)
    run = Experiment.from_config(settings, dataset=_dataset(settings), devices=devices)
    check_compiler_options(settings, run.mesh)

    began = time.perf_counter()
    lowered = run.lower_step()
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()

    memory: Any = compiled.memory_analysis()
    traffic = hlo.count(compiled.as_text() or "")
    # The compiler for GPUs has none.
    counts: Any = compiled.cost_analysis() or {
        "flops": _flops(run) / len(devices),
        "bytes accessed": traffic.touched,
    }
    batch = settings.train.batch_size
    height, width, channels = run.dataset.image_shape
    return Program(
        title=(
            f"{network_title(run.model)} ({settings.model.dtype}) on {target.name}: "
            f"{len(devices)} devices in {processes} process{'es' if processes > 1 else ''}, "
            f"images of {height}x{width}x{channels} in {len(run.dataset.classes)} classes"
        ),
        batch=(
            f"global batch {batch} = {batch // processes}/process = "
            f"{batch // len(devices)}/device; batch normalization over "
            f"{settings.statistics_group} images"
        ),
        devices=len(devices),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state().params)),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        hbm=target.memory,
        flops=counts["flops"],
        accessed=counts["bytes accessed"],
        kernels=traffic.kernels,
        collectives=dict(collections.Counter(_COLLECTIVE.findall(compiled.as_text() or ""))),
        trace_seconds=traced - began,
        compile_seconds=done - traced,
    )


def _flops(run: Experiment) -> float:
    """Floating-point operations of a program for all its devices, before it is optimized.

    jax counts by the backend that a program is for; that of CPUs counts any program. What
    `jax.shard_map` maps would count for one device only, so all images are put on one.
    """
    from jax._src.lib import _jax  # type: ignore[attr-defined]
    from jax.extend.backend import get_backend

    alone = dataclasses.replace(run, mesh=data_mesh([run.mesh.devices.flat[0]]))
    lowered: Any = alone.lower_step()
    module = lowered.compiler_ir("hlo").as_hlo_module()
    return float(_jax.hlo_module_cost_analysis(get_backend("cpu"), module)["flops"])


def _dataset(settings: Settings) -> Dataset:
    """The data set, or a blank one; with the number of images and classes of ImageNet."""
    if settings.data.source in BUILT_IN:
        return load(settings.data)
    size = settings.data.train_size or 224
    shape = (*height_width(size), 3)
    eval_shape = (*height_width(settings.data.eval_size or size), 3)

    def blank(count: int) -> ArraySource:
        # One blank image, seen `count` times: no memory behind it.
        images = np.broadcast_to(np.zeros((), np.uint8), (count, *shape))
        return ArraySource(images, np.broadcast_to(np.int32(0), (count,)))

    classes = tuple(f"class {i}" for i in range(settings.data.num_classes or 1000))
    train, evaluation = blank(1_281_167), blank(50_000)
    per_pixel = settings.task == "segmentation"  # only the shapes of labels matter
    return Dataset(
        settings.data.source, train, evaluation, shape, eval_shape, classes, masks=per_pixel
    )


def _reason(status: int, output: str) -> str:
    if status < 0:
        return f"{signal.Signals(-status).name} in the compiler"
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit status {status}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _main() -> None:
    job = json.load(sys.stdin)
    try:
        target = Target.parse(job["target"])
        answer = dataclasses.asdict(_compile(Settings.from_mapping(job["config"]), target))
    except ValueError as error:
        answer = {"error": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
        answer = {
            "error": f"the step does not fit {job['target']}: {line[:300]}; a smaller "
            "config.train.batch_size, config.model.remat=True or more chips reduce its memory"
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
