"""The train loop: what a run leaves, how it resumes, and what stops it."""

import dataclasses
import json
import logging
import os
import pathlib
import pickle
import re
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import pytest

from repvgg_jax.cluster import lock
from repvgg_jax.train import evaluate, loop, memory, resume
from repvgg_jax.train import step as step_module
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.hooks import parse_steps
from repvgg_jax.train.loop import train
from repvgg_jax.train.manifest import Manifest
from repvgg_jax.train.metrics import MetricsWriter
from repvgg_jax.train.workdir import Workdir
from tests.helpers.jit import QUICK
from tests.helpers.runs import (
    final_state,
    numbers,
    rows,
    small_config,
    small_experiment,
    small_settings,
)


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.INFO, logger="repvgg_jax")


def same_end(path: pathlib.Path, other: pathlib.Path) -> None:
    """Both runs ended bitwise identical, and reported the same numbers."""
    chex.assert_trees_all_equal(final_state(path), final_state(other))
    assert numbers(path) == numbers(other)


def test_what_a_run_leaves(small_run):
    path, outcome = small_run
    assert {entry.name for entry in path.iterdir()} == {
        "README.txt",
        "config.json",
        "metadata.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "curves.png",
        "confusion.png",
        "report.html",
    }
    assert Workdir(path).read_settings() == resume.started(small_settings(), "cpu")
    table = rows(path)
    assert [row["step"] for row in table if "train/loss" in row] == [4, 8, 11, 12, 16, 20, 22]
    assert [row["step"] for row in table if "eval/accuracy" in row] == [11, 22]
    last = table[-1]
    assert last["step"] == outcome.step == 22
    assert last["final/accuracy"] == outcome.accuracy
    assert last["final/accuracy_fused"] == outcome.accuracy_fused == outcome.accuracy
    assert 0 <= last["final/accuracy"] <= 1
    assert last["final/accuracy"] * 360 == pytest.approx(round(last["final/accuracy"] * 360))
    first, *_, end = (row["train/loss"] for row in table if "train/loss" in row)
    assert end < 0.9 * first


@pytest.mark.slow
def test_what_is_logged_and_a_trace(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("repvgg_jax.progress.EVERY", 0.0)
    path = tmp_path / "run"
    train(small_config(train__epochs=1), path, profile_steps=parse_steps("5:7"))
    assert list((path / "profile").rglob("*.xplane.pb"))
    assert f"trace: {path / 'profile'}" in caplog.messages
    compiling = [line for line in caplog.messages if line.startswith("compiling ")]
    assert compiling[0] == "compiling for 8x8"  # while it compiles
    assert set(compiling[1:]) == {"compiling the evaluation for 8x8"}
    lines = [line for line in caplog.messages if line not in compiling]
    assert lines[0].startswith("model=small dtype=float32 devices=8xcpu data=digits ")
    assert " train=1437 eval=360 epochs=1 " in lines[0]
    assert " batch=128 (16/device) " in lines[0]
    assert lines[1].startswith("compiled for 8x8 in ")
    assert all(w in lines[2] for w in ("step 4/11", "loss", "accuracy", "images/s", "data-wait"))
    assert "fused (360 images)" in lines[-4]
    assert lines[-3].startswith("macro accuracy: ")
    assert lines[-1] == f"next: python convert.py --workdir {path} --output deploy"


def test_a_directory_in_use_is_refused(tmp_path):
    workdir = Workdir(tmp_path / "run")
    with workdir.claimed(small_settings()), pytest.raises(ValueError, match="in use"):
        train(small_config(), workdir.path)
    with workdir.claimed(small_settings()):
        pass  # and is free afterwards


def test_a_run_that_was_killed_before_it_wrote_its_configuration(tmp_path):
    (tmp_path / lock.FILE).write_text(json.dumps({"machine": lock.machine_id(), "pid": 7}))
    with Workdir(tmp_path).claimed(small_settings()):
        assert (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_signal_inside_evaluation_saves_and_stops_there(small_run, tmp_path, monkeypatch):
    path = tmp_path / "run"
    real = step_module.EvalStep.__call__
    calls = []

    def signals(self, variables, batch):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, variables, batch)

    monkeypatch.setattr(step_module.EvalStep, "__call__", signals)
    outcome = train(small_config(), path)
    assert (outcome.step, outcome.stopped_by, len(calls)) == (11, signal.SIGTERM, 1)
    assert not any("eval/loss" in row for row in rows(path))
    monkeypatch.setattr(step_module.EvalStep, "__call__", real)
    train(small_config(), path)
    same_end(path, small_run[0])


class Killed(BaseException):
    """As abrupt as it gets inside one process."""


@pytest.mark.parametrize("at", [11, pytest.param(17, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_and_ends_bitwise_identical(small_run, tmp_path, monkeypatch, at):
    path = tmp_path / "run"
    real = MetricsWriter.show

    def dies(self, step, row):
        real(self, step, row)
        if step == at:
            raise Killed

    monkeypatch.setattr(MetricsWriter, "show", dies)
    with pytest.raises(Killed):
        train(small_config(), path)
    monkeypatch.setattr(MetricsWriter, "show", real)
    train(small_config(), path)
    same_end(path, small_run[0])


@pytest.mark.slow
def test_sigterm_saves_and_stops(small_run, tmp_path, monkeypatch, caplog):
    path = tmp_path / "run"
    real = MetricsWriter.show

    def signals(self, step, row):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "show", signals)
    outcome = train(small_config(), path)
    assert (outcome.step, outcome.stopped_by, outcome.accuracy) == (7, signal.SIGTERM, None)
    assert "SIGTERM at step 7" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(MetricsWriter, "show", real)
    outcome = train(small_config(), path)
    assert "resuming from step 7 of 22" in caplog.text
    # The row that ends at step 7 is one more than the other run has.
    chex.assert_trees_all_equal(final_state(path), final_state(small_run[0]))
    assert outcome.accuracy == small_run[1].accuracy


@pytest.mark.parametrize("at", ["start", "restore"])
def test_a_signal_while_a_run_starts_waits_for_the_first_poll(
    small_run, tmp_path, monkeypatch, caplog, at
):
    path, real = tmp_path / "run", Checkpoints.restore
    if at == "restore":
        shutil.copytree(small_run[0], path)
        shutil.rmtree(path / "checkpoints" / "22")

    def signals(self, like, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, like, **options)

    monkeypatch.setattr(Checkpoints, "restore", signals)
    step = 0 if at == "start" else 11
    outcome = train(small_config(), path)
    assert (outcome.step, outcome.stopped_by) == (step, signal.SIGTERM)
    assert f"SIGTERM at step {step}: nothing new to save" in caplog.text
    assert "compiled" not in caplog.text
    if at == "start":
        return  # that it can start again is what every other test shows
    monkeypatch.setattr(Checkpoints, "restore", real)
    train(small_config(), path)
    same_end(path, small_run[0])


def test_a_finished_run_only_reports_again(small_run, tmp_path, caplog):
    path = tmp_path / "run"
    shutil.copytree(small_run[0], path)
    assert train(small_config(), path) == small_run[1]
    assert "compiled" not in caplog.text
    assert numbers(path) == numbers(small_run[0])


def test_another_configuration_is_refused_with_the_difference(small_run):
    before = rows(small_run[0])
    other = small_config(optimizer__momentum=0.5, seed=9)
    with pytest.raises(ValueError, match=r"momentum: 0.9 -> 0.5.*--workdir") as caught:
        train(other, small_run[0])
    assert "config.seed: 0 -> 9" in str(caught.value)
    assert rows(small_run[0]) == before


def test_without_a_checkpoint_other_settings_are_accepted(small_run, tmp_path, caplog):
    workdir = Workdir(tmp_path)
    shutil.copy(small_run[0] / "config.json", tmp_path)
    workdir.metadata.write_text("{}")
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir(parents=True)  # unfinished
    other = small_settings(seed=9)
    workdir.claim(other)
    assert workdir.read_settings() == other
    assert not workdir.metadata.exists()
    assert len(caplog.messages) == 1
    assert "config.seed: 0 -> 9" in caplog.text
    (tmp_path / "checkpoints" / "11").mkdir()
    with pytest.raises(ValueError, match="seed: 9 -> 0"):
        workdir.claim(small_settings())


def test_only_a_few_settings_that_differ_are_named(small_run):
    other = small_config("A0", seed=9, augment__flip=0.5, ema__decay=0.5, train__epochs=3)
    other.optimizer.momentum = other.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"; and \d+ more\. ") as caught:
        train(other, small_run[0])
    assert str(caught.value).count(" -> ") == 5


def test_a_file_in_place_of_a_directory(tmp_path):
    (tmp_path / "run").touch()
    for use in (lambda w: w.claimed(small_settings()).__enter__(), Workdir.read_settings):
        with pytest.raises(ValueError, match="run is a file"):
            use(Workdir(tmp_path / "run"))


def test_the_best_checkpoint_is_named_with_its_accuracy(small_run, tmp_path, monkeypatch, caplog):
    path = tmp_path / "run"
    shutil.copytree(small_run[0], path)
    monkeypatch.setattr(Checkpoints, "best", lambda _: 11)
    train(small_config(), path)
    row = next(row for row in rows(path) if row["step"] == 11 and "eval/accuracy" in row)
    assert f"step 11 with {row['eval/accuracy']:.2%}" in caplog.text
    assert f"--workdir {path} --eval_only --step 11" in caplog.text


def test_a_source_that_is_missing_leaves_no_directory(tmp_path):
    for source in ("nosuch", str(tmp_path)):
        with pytest.raises(ValueError, match=source):
            train(small_config(), tmp_path / "run", init_from=source)
        assert not (tmp_path / "run").exists()


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not a run directory .* thesis\.tex"):
        train(small_config(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_nan_stops_the_run_after_it_was_written(tmp_path):
    config = small_config(optimizer__learning_rate=1e30, checkpoint__every_epochs=1)
    with pytest.raises(FloatingPointError) as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert "no checkpoint" in message
    assert "learning_rate (now 1e+30)" in message
    assert "another --workdir" not in message  # the directory takes other settings
    bad = rows(tmp_path / "run")[-1]
    assert message.startswith(f"step {bad['step']}: ")
    assert None in bad.values()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_update_that_is_not_finite_is_not_saved(tmp_path):
    """Loss and gradients of the last step are finite; what it made of the parameters is not."""
    config = small_config(
        train__batch_size=1432,
        train__epochs=1,
        optimizer__warmup_epochs=0.0,
        optimizer__learning_rate=1e30,
        optimizer__weight_decay=1e30,
        train__compiler_options=QUICK,
    )
    with pytest.raises(FloatingPointError, match=r"step 1: after the update params/\S+ .*1e\+30"):
        train(config, tmp_path / "run")
    (row,) = rows(tmp_path / "run")
    assert row["train/loss"] is not None
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_another_number_of_devices_is_logged(small_run, tmp_path, caplog):
    path = tmp_path / "run"
    shutil.copytree(small_run[0], path)
    shutil.rmtree(path / "checkpoints" / "22")
    train(small_config(), path)
    assert "rounding" not in caplog.text
    shutil.rmtree(path / "checkpoints" / "22")
    manifest = path / "checkpoints" / "11" / "manifest" / "metadata"
    saved = Manifest.read(path / "checkpoints" / "11")
    assert saved.saved_on == "8 cpu devices in 1 process"
    other = dataclasses.replace(saved, saved_on="4 tpu devices in 2 processes")
    manifest.write_text(json.dumps(other.content()))
    train(small_config(), path)
    assert re.search("4 tpu devices in 2 processes.*rounding", caplog.text)


def test_a_corrupt_checkpoint_is_skipped(small_run, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(small_run[0], workdir)
    for file in (workdir / "checkpoints" / "22" / "state" / "d").iterdir():  # lists the arrays
        file.write_bytes(file.read_bytes()[:-9])
    train(small_config(), workdir)
    assert "22 is corrupt" in caplog.text
    assert "resuming from step 11 of 22" in caplog.text
    same_end(workdir, small_run[0])


@pytest.mark.parametrize("text", ["3", "5:3", "0:4", "a:b", "-1:3"])
def test_steps_that_cannot_be_traced(text):
    with pytest.raises(ValueError, match=rf"--profile_steps={text} .*FIRST:END"):
        parse_steps(text)
    assert parse_steps("") == range(0)


def test_train_sizes_by_epoch():
    experiment = small_experiment(data__train_size=24, data__sizes=((0, 16), (2, 24), (5, 32)))
    sizes = experiment.size_at
    expected = [16, 16, 24, 24, 24, 32, 32]
    assert [sizes(epoch) for epoch in range(7)] == [(size, size) for size in expected]
    assert pickle.loads(pickle.dumps(sizes)) == sizes  # it goes to the processes that read
    rectangles = small_experiment(data__train_size=(24, 40), data__sizes=((0, (16, 8)), (1, 24)))
    assert [rectangles.size_at(epoch) for epoch in range(2)] == [(16, 8), (24, 24)]
    assert rectangles.abstract_batch()["image"].shape[1:] == (24, 40, 1)
    assert rectangles.abstract_batch((16, 8))["image"].shape[1:] == (16, 8, 1)


@pytest.mark.slow
def test_a_run_whose_images_grow(tmp_path, caplog):
    config = small_config(
        data__source="fake",
        data__mean=(0.5,) * 3,
        data__std=(0.3,) * 3,
        data__train_size=(24, 16),
        data__sizes=((0, 16), (1, (24, 16))),
        data__eval_size=(20, 36),
        data__workers=1,
        augment__mixup=0.2,
        augment__policy="none",
        train__compiler_options=QUICK,
    )
    train(config, tmp_path / "run")
    assert "compiled for 16x16 in" in caplog.text
    assert "compiled for 24x16 in" in caplog.text
    assert Workdir(tmp_path / "run").read_metadata().eval_shape == (20, 36, 3)
    assert rows(tmp_path / "run")[-1]["step"] == 8


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_out_of_memory_is_one_line(where, tmp_path, monkeypatch):
    """The error is XLA's own; the directory takes the settings that the line advises."""

    def too_much(*_, **__):
        jax.jit(lambda: jnp.zeros(1 << 45))().block_until_ready()

    if where == "step":
        monkeypatch.setattr(loop.CompiledStep, "__call__", too_much)
    else:
        monkeypatch.setattr(evaluate, "eval_batches", too_much)
    config = small_config(
        train__accumulate=2, train__epochs=1, bn__group_size=16, train__compiler_options=QUICK
    )
    with pytest.raises(ValueError, match=r"out of memory: .*RESOURCE_EXHAUSTED") as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    if where == "evaluation":
        assert "config.eval.batch_size=120" in message
        return
    for words in ("batch_size=128", "accumulate=2", "remat=False", "8 images at once per device"):
        assert words in message
    needed = float(re.search(r"needs ([0-9.]+) MiB", message)[1])
    assert 0.05 < needed < 100
    assert "accumulate=4" in message
    Workdir(tmp_path / "run").claim(small_settings(train__accumulate=4, bn__group_size=16))
    whole = memory.advice_for_step(small_settings(model__remat=True))
    assert whole.startswith("less: a smaller batch;")


def test_other_errors_of_xla_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explained(str, str):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(ValueError, match="out of memory"), memory.explained(str, str):
        raise MemoryError
