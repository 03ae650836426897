"""`benchmarks/gpu.py`: what it measures first, how it goes on, and that its errors are right."""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        minutes=9, end=540, least=40, limit=240, image_size=32, rounds=2, seconds=0.1, device="gpu",
        cache=tmp_path / "cache", batches=[256, 32, 1],
    )  # fmt: skip


def test_plan(gpu):
    rows = gpu.plan()
    assert len(set(rows)) == len(rows)
    # Nine minutes are enough for ten rows: limits, ours and the strongest peer come first.
    first = {(row.task, row.model) for row in rows[:9]}
    assert first == {("limits", "")} | {(t, m) for t in ("train", "deploy") for m in ("A0", "B1")}
    for model in ("A0", "B0", "B1", "B1g4", "B3"):
        trained = {row.runner for row in rows if row[:3] == ("train", model, 256)}
        assert {"covariance", "branches", "plain", "timm compile channels_last"} <= trained
        for batch in (1, 32, 256):
            deployed = {row.runner for row in rows if row[:3] == ("deploy", model, batch)}
            assert {"deploy stored", "timm compile channels_last", "onnxruntime"} <= deployed
    assert [gpu.Row.parse(str(row)) for row in rows] == rows


class Machine:
    """A clock that rows advance."""

    def __init__(self, gpu, monkeypatch, each=100.0):
        self.now, self.each, self.done = 0.0, each, []
        monkeypatch.setattr(gpu.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(gpu.harness, "in_subprocess", self.measure)

    def measure(self, script, job, *, timeout, **environment):
        self.now += min(self.each, timeout)
        if self.each >= timeout:
            return {"error": f"not done after {timeout:.0f} s"}
        self.done.append("/".join(map(str, job["row"])))
        if job["row"][0] == "limits":
            return {"bandwidth": 2e12, "arithmetic": 5e14}
        return {"seconds": [0.2, 0.1, 0.3], "errors": {"loss": 1e-3}, "ready_s": 9.0, "gb": 100.0}


def test_goes_on_where_it_stopped(gpu, monkeypatch, tmp_path, args):
    """A call of 250 s keeps two rows of 100 s, and the next one begins with the third."""
    machine = Machine(gpu, monkeypatch)
    rows = gpu.plan()[:5]
    for done in (2, 4, 5):
        store = gpu.Store(tmp_path, "NVIDIA X1", 32)
        began, args.end = machine.now, machine.now + 250
        gpu.run([row for row in rows if row not in store.rows], store, args)
        assert machine.now - began <= 250.1
        assert machine.done == [str(row) for row in rows[:done]]
        with store.path.open("a") as file:
            file.write('{"row": "deploy/A0')  # killed while it wrote
            file.write("\n")
    assert list(gpu.Store(tmp_path, "NVIDIA X1", 32).rows) == rows
    assert not gpu.Store(tmp_path, "NVIDIA X1", 64).rows
    monkeypatch.setattr(gpu.harness, "versions", lambda: {"jax": "0.0.1"})
    assert not gpu.Store(tmp_path, "NVIDIA X1", 32).rows


def test_a_row_that_never_ends_is_left_out(gpu, monkeypatch, tmp_path, args):
    Machine(gpu, monkeypatch, each=1000)
    store = gpu.Store(tmp_path, "NVIDIA X1", 32)
    gpu.run(gpu.plan()[:3], store, args)
    # Two had all the time that a row may have; the third only the rest of the nine minutes.
    assert [row["error"] for row in store.rows.values()] == ["not done after 240 s"] * 2


def test_page(gpu, monkeypatch, tmp_path, args):
    """Shares by hand: 100 GB in 0.2 s are a quarter of 2 TB/s."""
    Machine(gpu, monkeypatch)
    store = gpu.Store(tmp_path, "NVIDIA X1", 224)
    gpu.run(gpu.plan()[:3], store, args)
    row = gpu.plan()[1]
    cells = gpu.cells(row, store.rows[row], store)
    assert cells["images/s"] == pytest.approx(256 / 0.2)
    assert cells["speed / timm compiled"] == 1
    assert cells["of bandwidth"] == pytest.approx(0.25)
    # A0: 1.52 GMAC per image forward in training form, three times as much with backward.
    assert cells["of arithmetic"] == pytest.approx(6 * 256 * 1.52e9 / 0.2 / 5e14, rel=0.01)
    (page,) = tmp_path.glob("gpu-*-nvidia-x1.md")
    text = page.read_text()
    assert "2,000 GB/s" in text
    assert "| covariance" in text
    assert "rows, next " in text


_MEASURE = """
import json, sys
missing = ("grain", "tensorflow", "tensorflow_datasets", "ml_collections", "simplejpeg", "cv2")
sys.modules.update(dict.fromkeys(missing))  # as if they were not installed
sys.path.insert(0, sys.argv[1])
import harness, gpu
from gpu_rows import Row, measure
from repvgg_jax.variants import Variant

tiny = Variant("tiny", (2,), (8,), stem_channels=8, strides=(1,))
rows = [Row("train", tiny, 16, form) for form in ("covariance", "plain")]
rows += [Row("deploy", tiny, 4, form) for form in ("deploy stored", "deploy constant")]
found = [measure(row, size=12, rounds=2, seconds=0.01) for row in rows]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.system
def test_measures_without_what_data_need():
    """In float32 on a CPU: right to rounding, and a batch that repeats images changes nothing."""
    command = [sys.executable, "-c", _MEASURE, str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [set(row["errors"]) for row in rows] == [{"loss", "update"}] * 2 + [{"logits"}] * 2
    for row in rows:
        assert all(0 <= error < 1e-4 for error in row["errors"].values()), row["errors"]
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["gb"] > 0


def test_finds_a_wrong_update(gpu):
    """The error is that of all parameters together."""
    rows = importlib.import_module("gpu_rows")
    expected = [rows.np.float32([3, 0]), rows.np.float32([[4.0]])]
    off = [rows.np.float32([3, 0]), rows.np.float32([[4.5]])]
    assert rows._relative(off, expected) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"batch of 12 .* 8"):
        rows.repeated(rows.np.zeros((8, 2)), 12)
