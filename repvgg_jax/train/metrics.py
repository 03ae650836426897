"""Metrics of a run: means over steps, rows in `metrics.jsonl` and TensorBoard, and the log."""

import contextlib
import json
import logging
import math
import pathlib
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import rich.console
import rich.live

from repvgg_jax import files
from repvgg_jax.files import write_text
from repvgg_jax.text import first_few, named_leaves
from repvgg_jax.train import report
from repvgg_jax.train.by_class import ByClass
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.experiment import Experiment, network_title
from repvgg_jax.train.manifest import not_finite
from repvgg_jax.train.state import TrainState
from repvgg_jax.train.tensorboard import EventFile
from repvgg_jax.train.workdir import Workdir
from repvgg_jax.typed import typed

Row = Mapping[str, float]

_SPEED = ("images_per_second_per_device", "data_wait")
DRAW_EVERY = 10.0
"""Seconds between two drawings of a run: drawing takes longer than a short epoch."""

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the rows of a run, on process 0 only; a context manager that closes the files.

    In a terminal the line of the running step is updated in place; elsewhere every row of
    training metrics is logged.
    """

    def __init__(self, workdir: Workdir, experiment: Experiment, *, start_step: int):
        """Opens the files, and removes rows after `start_step`.

        A resumed run repeats the steps after its checkpoint; keeping their old rows would count
        them twice.
        """
        self._active = jax.process_index() == 0
        self._workdir, self._experiment = workdir, experiment
        self._first: tuple[int, float] | None = None  # step and time, for the time left
        self._live: rich.live.Live | None = None
        self._next_drawing = 0.0  # time
        self._rows = _rows_until(start_step, workdir)
        self._drawn = len(self._rows)
        self._picture: Callable[[pathlib.Path], None] | None = None
        if not self._active:
            return
        write_text(workdir.metrics, "".join(json.dumps(row) + "\n" for row in self._rows))
        self._board = EventFile(
            workdir.tensorboard, purge_step=start_step + 1 if start_step else None
        )
        console = rich.console.Console(highlight=False, soft_wrap=True)
        if console.is_terminal and logger.isEnabledFor(logging.INFO):
            # It also redirects standard output, so that logged lines appear above the live one.
            self._live = rich.live.Live(console=console, transient=True)
            self._live.start()

    def show(self, step: int, row: Row) -> None:
        """Shows the running step, in a terminal only; to be called for every step."""
        first = self._first is None
        if self._first is None:
            self._first = step, time.monotonic()
        if self._live is not None:  # it redraws itself four times per second
            self._live.update(self._line(step, row), refresh=first)

    def write(self, row: Row) -> None:
        """Adds a row, which needs `step`. Numbers that are not finite are written as null.

        Raises:
          OSError: it cannot be written, or the run directory is gone.
        """
        if not self._active:
            return
        self._workdir.check_there()
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._rows.append(finite)
        with self._workdir.metrics.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        scalars = {
            name if "/" in name else f"speed/{name}": value
            for name, value in row.items()
            if "/" in name or name in _SPEED
        }
        self._board.write(int(row["step"]), scalars)
        if "train/loss" in row:
            if self._live is None:
                logger.info("%s", self._line(int(row["step"]), row))
            else:
                self._live.refresh()
        headline = self._experiment.task.headline
        if f"eval/{headline}" in row:
            logger.info(
                "step %d: validation %s %.2f%%, loss %.4f",
                row["step"],
                self._experiment.task.names[headline],
                100 * row[f"eval/{headline}"],
                row["eval/loss"],
            )

    def evaluated(self, step: int) -> bool:
        """Whether there is a row of an evaluation at that step."""
        return any(row["step"] == step and "eval/loss" in row for row in self._rows)

    def refresh(self, picture: Callable[[pathlib.Path], None] | None) -> None:
        """Draws, or leaves it to the next time or the exit: once in `DRAW_EVERY` seconds."""
        self._picture = picture
        if time.monotonic() >= self._next_drawing:
            self.draw(picture=picture)

    def draw(
        self,
        by_class: ByClass | None = None,
        *,
        picture: Callable[[pathlib.Path], None] | None = None,
    ) -> None:
        """Writes `curves.png` and `report.html` of all rows so far.

        Args:
          by_class: of the final evaluation, for `confusion.png`.
          picture: draws `examples.png`.
        """
        if self._active:
            self._workdir.check_there()
            report.write(
                self._workdir,
                title=f"{network_title(self._experiment.model)} on {self._experiment.dataset.name}",
                headline=self._experiment.task.headline,
                picture=picture,
                rows=self._rows,
                config=self._experiment.settings.as_json(),
                by_class=by_class,
            )
            self._next_drawing = time.monotonic() + DRAW_EVERY
            self._drawn = len(self._rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._active:
            self._board.close()
        if len(self._rows) > self._drawn:
            with contextlib.suppress(OSError):  # what ended the run matters more
                self.draw(picture=self._picture)

    def _line(self, step: int, row: Row) -> str:
        first, began = self._first or (step, time.monotonic())
        total = self._experiment.total_steps
        left = (time.monotonic() - began) / max(1, step - first) * (total - step)
        # A narrow terminal cuts off the end of the line, so the least urgent comes last.
        return (
            f"step {step}/{total}, {_duration(left)} left  "
            f"loss {row['train/loss']:.4f}  accuracy {row['train/accuracy']:.2%}  "
            f"{row['images_per_second_per_device']:,.0f} images/s/device  "
            f"data-wait {row['data_wait']:.0%}"
        )


class StepMetrics:
    """Means of the train step's metrics since the last row.

    Metrics are read one step late, while the device is busy with the next step, so the device
    never waits for the host.
    """

    def __init__(self, experiment: Experiment, writer: MetricsWriter, checkpoints: Checkpoints):
        self._experiment, self._writer, self._checkpoints = experiment, writer, checkpoints
        self._pending: tuple[int, Any] | None = None
        self._row: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Starts a row, and the clock; the time since the last one was not spent on training."""
        self._count, self._waited, self._sums = 0, 0.0, dict[str, float]()
        self._began = time.monotonic()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A context whose duration counts as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def push(self, step: int, metrics: Any) -> None:
        """Keeps the metrics of a step that is still running, and reads those of the one before.

        Raises:
          FloatingPointError: the loss or a gradient of the step before is not finite; its row
            is written first.
        """
        self._read()
        self._pending = (step, metrics)

    def flush(self, state: TrainState) -> None:
        """Reads what is pending, ends the row, and checks the state that it led to.

        Raises:
          FloatingPointError: as `push`; or the update made the state infinite, which no metric of
            its step shows.
        """
        self._read()
        self._write()
        if names := not_finite(state):
            raise FloatingPointError(
                f"step {int(state.step)}: after the update {first_few(names, 3)} is not finite; "
                f"{self._advice()}"
            )

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        bad_leaf = int(values.pop("first_bad_gradient"))
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        seconds = time.monotonic() - self._began
        settings = self._experiment.settings
        images = self._count * settings.train.batch_size
        self._row = {
            "step": step,
            "epoch": self._experiment.position(step) / self._experiment.steps_per_epoch,
            **{f"train/{name}": total / self._count for name, total in self._sums.items()},
            "images_per_second_per_device": images / seconds / jax.device_count(),
            "data_wait": self._waited / seconds,
        }
        self._writer.show(step, self._row)
        if bad_leaf >= 0 or not math.isfinite(values["loss"]):
            self._write()
            raise FloatingPointError(self._diagnosis(step, values["loss"], bad_leaf))
        if step % settings.report.every_steps == 0:
            self._write()
            self.restart()

    def _write(self) -> None:
        if self._count:
            rate = self._experiment.learning_rate(int(self._row["step"]))
            self._writer.write({**self._row, "train/learning_rate": rate})

    def _diagnosis(self, step: int, loss: float, bad_leaf: int) -> str:
        what = f"the loss is {loss}"
        if math.isfinite(loss):
            name = list(named_leaves(self._experiment.abstract_state().params))[bad_leaf]
            what = f"the gradient of {name} is not finite (the loss is {loss:g})"
        return f"step {step}: {what}; {self._advice()}"

    def _advice(self) -> str:
        optimizer = self._experiment.settings.optimizer
        # Without a checkpoint, the run directory takes other settings.
        where = "" if self._checkpoints.newest() is None else ", in another --workdir"
        return (
            f"{self._checkpoints.last_good()}; a smaller "
            f"config.optimizer.learning_rate (now {optimizer.learning_rate:g}) or a longer "
            f"config.optimizer.warmup_epochs (now {optimizer.warmup_epochs:g}) usually helps{where}"
        )


def _rows_until(step: int, workdir: Workdir) -> list[report.Row]:
    if not workdir.metrics.exists():
        return []
    *lines, last = workdir.metrics.read_bytes().split(b"\n")
    rows = [_row(line) for line in lines]
    if damaged := rows.count(None):
        logger.warning(
            "%s: %d of %d rows are damaged and are left out", workdir.metrics, damaged, len(rows)
        )
    rows.append(_row(last))  # empty, or the process died while it wrote this line
    return [
        row
        for row in rows
        if row is not None and row["step"] <= step and "final/accuracy" not in row
    ]


def _row(line: bytes) -> report.Row | None:
    """A row of `metrics.jsonl`; None if it is damaged."""
    try:
        row = typed(dict[str, int | float | None], files.parse_json(line), "row")
    except ValueError:
        return None
    return row if isinstance(row.get("step"), int) else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
