"""Means over the steps between two rows of the report, the clock, and the watch for NaN."""

import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from repvgg_jax.data.batches import Batch
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.report import Report, as_floats
from repvgg_jax.train.run import Run


class Meter:
    """Reads the metrics of every step, one step late, so that the device never waits."""

    def __init__(self, run: Run, report: Report, checkpoints: Checkpoints):
        self._run, self._report, self._checkpoints = run, report, checkpoints
        self._pending: tuple[int, Any] | None = None
        self._row: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Starts a row here; what happened since the last one was not training."""
        self._count, self._waited, self._sums = 0, 0.0, dict[str, float]()
        self._began = time.monotonic()

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time it takes is the data-wait."""
        began = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - began
        return batch

    def take(self, step: int, metrics: Any) -> None:
        """Keeps the metrics of a step that is still running, and reads those before it.

        Raises:
          FloatingPointError: those before are not finite; they are written down first.
        """
        self._read()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads what is pending and ends the row; raises as `take`."""
        self._read()
        self._record()

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = as_floats(metrics)
        bad_leaf = int(values.pop("first_bad_gradient"))
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        seconds = time.monotonic() - self._began
        images = self._count * self._run.config.train.batch_size
        self._row = {
            "step": step,
            "epoch": step / self._run.steps_per_epoch,
            **{f"train/{name}": total / self._count for name, total in self._sums.items()},
            "images_per_second_per_device": images / seconds / jax.device_count(),
            "data_wait": self._waited / seconds,
        }
        self._report.step(step, self._row)
        if bad_leaf >= 0 or not math.isfinite(values["loss"]):
            self._record()
            raise FloatingPointError(self._diagnosis(step, values, bad_leaf))
        if step % self._run.config.report.every_steps == 0:
            self._record()
            self.restart()

    def _record(self) -> None:
        if self._count:
            self._report.record(self._row)

    def _diagnosis(self, step: int, values: dict[str, float], bad_leaf: int) -> str:
        if not math.isfinite(values["loss"]):
            what = f"the loss is {values['loss']}"
        else:
            leaves, _ = jax.tree_util.tree_flatten_with_path(self._run.abstract_state().params)
            name = jax.tree_util.keystr(leaves[bad_leaf][0], simple=True, separator="/")
            what = f"the gradient of {name} is not finite (the loss is {values['loss']:g})"
        saved = self._checkpoints.newest()
        return (
            f"step {step}: {what}; the last good checkpoint is "
            f"{'none' if saved is None else f'that of step {saved}'}; a smaller "
            f"config.optimizer.learning_rate (now {self._run.config.optimizer.learning_rate:g}) "
            "or a longer config.optimizer.warmup_epochs usually helps"
        )
