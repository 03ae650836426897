"""Runs of several processes on this machine, started as a person starts them."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.helpers.flags import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds; these machines are busy

# A few thousand parameters on made-up images; a step takes milliseconds.
RECIPE = """
from repvgg_jax import Variant
from repvgg_jax.train.config import default_config


def get_config():
    config = default_config(Variant("tiny", (1, 1), (8, 16), 8, strides=(2, 2), stem_stride=2))
    config.data.source = "fake"
    config.train.batch_size, config.train.epochs = 64, 2
    config.optimizer.warmup_epochs = 1.0
    config.eval.batch_size = 64
    config.report.every_steps = 4
    return config
"""

# The same in float64, for runs that are compared with each other: in float32, sums in another order
# differ in the seventh digit, and if a value before a ReLU therefore has the other sign, the
# gradients of two runs differ by as much as one pixel counts. How far the runs are apart after some
# steps then depends on the processor. Pixels are normalized without rounding.
FLOAT64 = RECIPE.replace(
    "    return config",
    """    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return config


def create_model(*arguments, **options):
    options |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
    return repvgg_jax.create_model(*arguments, **options)


import jax.numpy as jnp
import repvgg_jax
from repvgg_jax.train import experiment

experiment.create_model = create_model""",
)

# A segmenter in float64, on few scenes of digits.
SEGMENTER64 = """
import jax.numpy as jnp

import repvgg_jax
from repvgg_jax import Variant
from repvgg_jax.data import scenes
from repvgg_jax.train import experiment
from repvgg_jax.train.config import default_config

scenes.TRAINING_SCENES, scenes.VALIDATION_SCENES = 64, 20


def get_config():
    config = default_config(Variant("tiny", (1, 1), (4, 8), 4, strides=(1, 2), stem_stride=2))
    config.task = "segmentation"
    config.segmentation.output_stride, config.segmentation.bins = 4, (1, 2)
    config.segmentation.width, config.segmentation.auxiliary_width = 8, 4
    config.data.source, config.data.train_size, config.data.eval_size = "scenes", 33, 64
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.train.batch_size, config.train.epochs = 16, 2
    config.eval.batch_size = 16
    config.report.every_steps = 4
    return config


def create_segmenter(*arguments, **options):
    options |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
    return repvgg_jax.create_segmenter(*arguments, **options)


experiment.create_segmenter = create_segmenter
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Processes that run train.py or another program, each with its output in files."""

    def __init__(
        self,
        folder: pathlib.Path,
        commands: Sequence[tuple[list[str], dict[str, str]]],
        program: str | None,
        recipe: str,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.py").write_text(recipe)
        start = [str(ROOT / "train.py"), "--config=recipe.py"]
        if program is not None:
            (folder / "program.py").write_text(program)
            start = ["program.py"]
        self._outputs = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(commands))]
        self.processes = []
        for (arguments, environment), (out, err) in zip(commands, self._outputs, strict=True):
            with out.open("w") as stdout, err.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *start, *arguments],
                        cwd=folder,
                        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                        stdout=stdout,
                        stderr=stderr,
                    )
                )

    def out(self, process: int) -> str:
        return self._outputs[process][0].read_text()

    def err(self, process: int) -> str:
        return self._outputs[process][1].read_text()

    def wait(self) -> list[int]:
        """Exit statuses; all output is shown where a test fails."""
        statuses = [process.wait(timeout=TIMEOUT) for process in self.processes]
        for process, status in enumerate(statuses):
            print(f"--- {process}: {status}\n{self.out(process)}{self.err(process)}")
        return statuses

    def wait_until(self, happened: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not happened():
            assert time.monotonic() - began < TIMEOUT, "it never happened"
            assert all(process.poll() is None for process in self.processes), self.wait()
            time.sleep(0.05)


@contextlib.contextmanager
def started(
    folder: pathlib.Path,
    count: int,
    *arguments: str,
    devices: int = 2,
    own: Mapping[int, Sequence[str]] | None = None,
    launcher: str | None = None,
    program: str | None = None,
    recipe: str = RECIPE,
) -> Iterator[Processes]:
    """Starts `count` processes of one run in `folder`, its workdir `run`.

    Args:
      folder: where they run.
      count: how many.
      *arguments: of all of them.
      devices: of each process.
      own: further arguments of single ones.
      launcher: "slurm" or "open mpi": they are told about each other as these do, not by
        --distributed.
      program: source of a program to run instead of train.py.
      recipe: content of recipe.py, `RECIPE`, `FLOAT64` or `SEGMENTER64`.
    """
    port, commands = free_port(), []
    for i in range(count):
        # Everything runs for milliseconds and compiles for seconds.
        environment = {"XLA_FLAGS": xla_flags(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if recipe in (FLOAT64, SEGMENTER64):
            environment["JAX_ENABLE_X64"] = "1"
        given = ["--workdir=run", *arguments, *(own or {}).get(i, ())]
        if launcher == "slurm":
            environment |= {
                "SLURM_JOB_ID": "4242",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(i),
                "SLURM_LOCALID": str(i),
                "JAX_COORDINATOR_PORT": str(port),
            }
        elif launcher == "open mpi":  # version 5
            environment |= {
                "OMPI_COMM_WORLD_SIZE": str(count),
                "OMPI_COMM_WORLD_RANK": str(i),
                "OMPI_COMM_WORLD_LOCAL_SIZE": str(count),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
                "PMIX_NAMESPACE": f"prterun-{port}@1",
            }
        elif count > 1:
            given.append(f"--distributed=127.0.0.1:{port},{count},{i}")
        commands.append((given, environment))
    run = Processes(folder, commands, program, recipe)
    try:
        yield run
    finally:
        for process in run.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
