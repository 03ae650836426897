"""What a run reports: rows, TensorBoard, curves and the page."""

import contextlib
import io
import itertools
import logging
import re
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from repvgg_jax import cli
from repvgg_jax.train import metrics, report
from repvgg_jax.train.by_class import ByClass
from repvgg_jax.train.metrics import MetricsWriter
from repvgg_jax.train.workdir import Workdir
from tests.helpers.runs import rows, small_experiment


def test_tensorboard_events_hold_the_same_numbers(small_run):
    path, _ = small_run
    found = {}
    for file in (path / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            data = data[16 + length :]
    assert RecordWriter  # the format that was read above is tensorboardX's
    for row in rows(path):
        for name, value in row.items():
            if name not in ("step", "epoch"):
                tag = name if "/" in name else f"speed/{name}"
                assert found[tag, row["step"]] == pytest.approx(value, rel=1e-6)
    rates = [row["train/learning_rate"] for row in rows(path) if "train/loss" in row]
    wanted = small_experiment().learning_rate
    assert rates == [wanted(step) for step in (4, 8, 11, 12, 16, 20, 22)]
    assert max(rates) == pytest.approx(0.4 / 2, rel=0.1)  # per 256 images


def test_a_clock_that_jumps_stops_nothing(tmp_path, monkeypatch):
    """Nor does it make a file of an earlier start disappear."""
    times = itertools.cycle((1.7e9, 1.7e9, -4e9, 3e11, 0.0))
    monkeypatch.setattr(time, "time", lambda: next(times))
    workdir, experiment = Workdir(tmp_path), small_experiment()
    workdir.claim(experiment.settings)
    row = {"eval/accuracy": 0.5, "eval/loss": 1.0}
    for start in range(3):
        with MetricsWriter(workdir, experiment, start_step=start) as writer:
            writing = threading.Thread(
                target=lambda w=writer: [w.write({"step": step, **row}) for step in range(40)],
                daemon=True,
            )
            writing.start()
            writing.join(timeout=60)
            assert not writing.is_alive()
    assert len(list(workdir.tensorboard.iterdir())) == 3


def test_the_page_holds_everything_and_needs_nothing(small_run):
    path, outcome = small_run
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (path / "report.html").read_text()
    assert f"{outcome.accuracy:.4f}" in text
    for words in (
        "as trained",
        "fused",
        "finished at step 22",
        "Configuration",
        "batch_size",
        "jaxlib",
        "lowest accuracy",
        "Confusion matrix",
        "macro_accuracy",
        "<td>best</td>",
    ):
        assert words in text
    assert "data:image/png;base64," in text
    assert (path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # nothing is loaded from anywhere


def test_the_page_says_how_fast_it_was_and_how_long_it_waited(small_run):
    path, _ = small_run
    found = [row for row in rows(path) if "data_wait" in row]
    assert len(found) == 7
    speeds = sorted(row["images_per_second_per_device"] for row in found)
    waits = sorted(row["data_wait"] for row in found)
    assert speeds[0] > 0
    assert 0 <= waits[0] <= waits[-1] < 1
    text = (path / "report.html").read_text()
    section = text.partition("<h2>Speed</h2>")[2].partition("<h2>")[0]
    table = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in section.splitlines()]
    assert [line for line in table if line] == [
        ["over the rows", "median", "least", "most"],
        ["images/s/device", *(f"{speeds[i]:,.1f}" for i in (3, 0, -1))],
        ["waiting for data", *(f"{waits[i]:.1%}" for i in (3, 0, -1))],
    ]


def test_the_median_of_two_rows_is_their_mean(tmp_path):
    two = [
        {"step": n, "images_per_second_per_device": speed, "data_wait": 0.0}
        for n, speed in ((1, 100.0), (2, 300.0))
    ]
    report.write(Workdir(tmp_path), title="two", rows=two, config={})
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"<td>([\d.]+)</td>", text)[:3] == ["200.0", "100.0", "300.0"]


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> list[int]:
    """How many rows each drawing of the run in `tmp_path` has."""
    found: list[int] = []
    monkeypatch.setattr(report, "write", lambda *_, rows, **__: found.append(len(rows)))
    Workdir(tmp_path).claim(small_experiment().settings)
    return found


def evaluate_three_times(writer: MetricsWriter) -> None:
    for step in range(3):
        writer.write({"step": step, "eval/accuracy": 0.5, "eval/loss": 1.0})
        writer.refresh(None)


def test_short_epochs_are_not_all_drawn(drawn, tmp_path, monkeypatch):
    """What was left out is drawn at the end."""
    with MetricsWriter(Workdir(tmp_path), small_experiment(), start_step=9) as writer:
        for seconds in (0.0, 3600.0):
            monkeypatch.setattr(metrics, "DRAW_EVERY", seconds)
            evaluate_three_times(writer)
    assert drawn == [1, 2, 3, 4, 6]


def test_a_run_that_fails_is_drawn_with_every_row(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "DRAW_EVERY", 3600.0)
    with (
        contextlib.suppress(FloatingPointError),
        MetricsWriter(Workdir(tmp_path), small_experiment(), start_step=9) as writer,
    ):
        evaluate_three_times(writer)
        writer.write({"step": 3, "final/loss": 0.5})
        raise FloatingPointError
    assert drawn == [1, 4]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with MetricsWriter(Workdir(tmp_path), small_experiment(), start_step=0) as writer:
        writer.write({"step": 1, "eval/accuracy": 0.5, "eval/loss": 1.0})
        writer.draw()
    assert not list(tmp_path.iterdir())


class TestLogHandler:
    """The messages of several processes on one terminal."""

    @pytest.fixture
    def log(self):
        logger = logging.Logger("repvgg_jax.test", logging.INFO)
        logger.addHandler(cli.LogHandler())
        return logger

    def test_one_process(self, log, capsys):
        log.info("step %d", 3)
        log.warning("a bad [image]")
        assert capsys.readouterr() == ("step 3\n", "a bad [image]\n")

    @pytest.mark.parametrize("index", [0, 1])
    def test_several_processes(self, log, capsys, monkeypatch, index):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        log.info("a")
        log.warning("b")
        assert capsys.readouterr() == ("" if index else "a\n", f"process {index}: b\n")
        log.info("c", extra={"all_processes": True})
        assert capsys.readouterr() == (f"process {index}: c\n", "")


def test_the_best_of_several_evaluations():
    table = [{"step": 1, "eval/accuracy": 0.5}, {"step": 2, "eval/accuracy": 0.7}, {"step": 3}]
    table += [{"step": 4, "eval/accuracy": 0.7}, {"step": 5, "eval/accuracy": None}]
    assert report.best_row(table) is table[3]
    assert report.best_row([{"step": 3}]) is None
    table[0]["eval/accuracy"] = float("nan")
    assert report.best_row(table) is table[3]
    assert report.best_row(table[:1]) is None


@pytest.mark.parametrize("final", [False, True])
def test_numbers_that_are_not_finite(final, tmp_path):
    Workdir(tmp_path).config.touch()
    with MetricsWriter(Workdir(tmp_path), small_experiment(), start_step=0) as writer:
        for step, accuracy in enumerate((float("nan"), 0.5, float("inf"))):
            writer.write({"step": step, "eval/accuracy": accuracy, "eval/loss": float("nan")})
        if final:
            writer.write({"step": 2, "final/accuracy": float("nan"), "final/loss": 1.0})
    page = (tmp_path / "report.html").read_text()
    assert [row["eval/accuracy"] for row in rows(tmp_path)[:3]] == [None, 0.5, None]
    assert "<td>1</td><td>0.5000</td><td>not finite</td><td>best</td>" in page
    assert "<td>0</td><td>not finite</td><td>not finite</td><td></td>" in page


def test_names_that_are_not_utf8_are_printed(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="utf-8"))
    cli._print_any_name()
    print("café caf\udce9", flush=True)
    assert output.getvalue() == "café caf\\udce9\n".encode()


class TestByClass:
    """Of four classes: a is always right, b is taken for c, c is always wrong, d has no images."""

    confusion = np.array([[3, 0, 0, 0], [0, 1, 3, 0], [2, 0, 0, 0], [0, 0, 0, 0]])

    def found(self):
        images = self.confusion.sum(axis=1)
        with np.errstate(invalid="ignore"):
            accuracy = np.diag(self.confusion) / images
        means = {"class_images": images, "class_accuracy": accuracy, "confusion": self.confusion}
        return ByClass.of("abcd", means)

    def test_the_worst_classes(self):
        assert self.found().worst(9) == [2, 1, 0]
        assert self.found().line(2) == "c 0.0% of 2, b 25.0% of 4"
        _, table = self.found().table()
        assert table[0] == ("c", "2", "0.0%", "a (100%)")
        assert table[1] == ("b", "4", "25.0%", "c (75%)")
        assert table[2] == ("a", "3", "100.0%", "")

    @pytest.mark.parametrize("count", [4, 40, 200])
    def test_the_picture(self, count, tmp_path):
        wide = np.zeros((count, count), int)
        wide[:4, :4] = self.confusion
        images = wide.sum(axis=1)
        names = [f"class {i}" for i in range(count)]
        ByClass(tuple(names), images, images * 0.0, wide).draw(tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as picture:
            assert min(picture.size) > 300
            assert max(picture.size) < 1400
