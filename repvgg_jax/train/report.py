"""What a person sees of a run: lines, `metrics.jsonl`, TensorBoard, the curves and the page."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import rich.console
import rich.live
from tensorboardX import SummaryWriter

from repvgg_jax.train import curves, page
from repvgg_jax.train.workdir import Workdir, write_atomically

Row = Mapping[str, float]


class Report:
    """Reports of one run; silent on every process but the first, unless asked not to be.

    In a terminal the line of the running step rewrites itself; elsewhere there is a plain line
    for every row of `metrics.jsonl`.
    """

    def __init__(
        self,
        workdir: Workdir,
        *,
        title: str,
        config: Mapping[str, Any],
        start_step: int,
        total_steps: int,
    ):
        """Opens the files, and takes back what was reported after `start_step`.

        A run that continues repeats the steps after its checkpoint; keeping their old rows
        would count them twice.
        """
        self._active = jax.process_index() == 0
        self._workdir, self._title, self._config = workdir, title, config
        self._total_steps = total_steps
        self._clock: tuple[int, float] | None = None
        self._console = rich.console.Console(highlight=False, soft_wrap=True)
        self._live: rich.live.Live | None = None
        self._rows = _rows_until(start_step, workdir)
        if not self._active:
            return
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        write_atomically(workdir.metrics, text)
        self._board = SummaryWriter(
            str(workdir.tensorboard), purge_step=start_step + 1 if start_step else None
        )
        if self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, transient=True)
            self._live.start()

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._active:
            self._console.print(text, markup=False)

    def say_for_itself(self, text: str) -> None:
        """Prints a line on any process; those after the first say which they are."""
        if self._active:
            self.say(text)
        else:
            self._console.print(f"process {jax.process_index()}: {text}", markup=False)

    def step(self, step: int, row: Row) -> None:
        """Shows the state of the running step, in a terminal only; call it for every step."""
        if self._clock is None:
            self._clock = step, time.monotonic()
        if self._live is not None:
            self._live.update(self._line(step, row))

    def record(self, row: Row) -> None:
        """Adds a row; it needs `step`. Numbers that are not finite are written as null."""
        if not self._active:
            return
        self._rows.append(row)
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        with self._workdir.metrics.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        for name, value in row.items():
            if "/" in name:
                self._board.add_scalar(name, value, int(row["step"]))
        if "train/loss" in row and self._live is None:
            self.say(self._line(int(row["step"]), row))
        if "eval/accuracy" in row:
            self.say(
                f"step {int(row['step'])}: held-out accuracy {row['eval/accuracy']:.2%}, "
                f"loss {row['eval/loss']:.4f}"
            )

    def tested(self, step: int) -> bool:
        """Whether there is a row of an evaluation at that step."""
        return any(row["step"] == step and "eval/loss" in row for row in self._rows)

    def draw(self) -> None:
        """Draws the curves, and writes the page, of all rows so far."""
        if self._active:
            curves.draw(self._rows, self._workdir.curves, self._title)
            page.write(self._workdir, self._title, self._rows, self._config)

    def close(self) -> None:
        """Ends the live line and closes the files."""
        if self._live is not None:
            self._live.stop()
        if self._active:
            self._board.close()

    def _line(self, step: int, row: Row) -> str:
        first, began = self._clock or (step, time.monotonic())
        left = (time.monotonic() - began) / max(1, step - first) * (self._total_steps - step)
        # The end of a line is what a narrow terminal cuts off, so the least urgent comes last.
        return (
            f"step {step}/{self._total_steps}, {_duration(left)} left  "
            f"loss {row['train/loss']:.4f}  accuracy {row['train/accuracy']:.2%}  "
            f"{row['images_per_second_per_device']:,.0f} images/s a device  "
            f"data-wait {row['data_wait']:.0%}"
        )


def _rows_until(step: int, workdir: Workdir) -> list[Row]:
    if not workdir.metrics.exists():
        return []
    rows = []
    for line in workdir.metrics.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # the process died while it wrote this line
        if row["step"] <= step and "final/accuracy" not in row:
            rows.append(row)
    return rows


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Device scalars as numbers, in one transfer."""
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
