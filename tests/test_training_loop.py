"""Whole runs: what they leave, how they continue, and what stops them."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import threading
import time

import chex
import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from repvgg_jax import fuse_params, save_weights
from repvgg_jax.cluster import lock as owner
from repvgg_jax.data.batches import eval_batches
from repvgg_jax.train import config as configs
from repvgg_jax.train import evaluation, loop, report
from repvgg_jax.train import step as step_module
from repvgg_jax.train.assessment import assess
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.loop import train
from repvgg_jax.train.manifest import Manifest
from repvgg_jax.train.profile import parse_steps
from repvgg_jax.train.run import Run
from repvgg_jax.train.start import starting_state
from repvgg_jax.train.workdir import Workdir
from tests.runs import SMALL, small_config


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def numbers(path: pathlib.Path) -> list[dict]:
    """Rows without what the clock has a say in."""
    return [
        {k: v for k, v in row.items() if "per_second" not in k and k != "data_wait"}
        for row in rows(path)
    ]


def final_state(path: pathlib.Path, config):
    run = Run.from_config(config)
    with Checkpoints(path / "checkpoints") as checkpoints:
        return jax.device_get(checkpoints.restore(run.abstract_state()))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing ever interrupted."""
    path = tmp_path_factory.mktemp("straight") / "run"
    outcome = train(small_config(), path)
    return path, outcome


def test_what_a_run_leaves(straight):
    path, outcome = straight
    assert {entry.name for entry in path.iterdir()} == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "curves.png",
        "report.html",
    }
    assert json.loads((path / "config.json").read_text()) == configs.plain(small_config())
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
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


def test_tensorboard_events_hold_the_same_numbers(straight):
    path, _ = straight
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
            if "/" in name:
                assert found[name, row["step"]] == pytest.approx(value, rel=1e-6)


def test_the_page_holds_everything_and_needs_nothing(straight):
    path, outcome = straight
    text = (path / "report.html").read_text()
    assert f"{outcome.accuracy:.4f}" in text
    for words in (
        "three branches",
        "fused",
        "finished at step 22",
        "Configuration",
        "batch_size",
        "jaxlib",
    ):
        assert words in text
    assert "data:image/png;base64," in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # nothing is loaded from anywhere


def test_the_page_says_how_fast_it_was_and_how_long_it_waited(straight):
    path, _ = straight
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
        ["images/s a device", *(f"{speeds[i]:,.1f}" for i in (3, 0, -1))],
        ["waiting for data", *(f"{waits[i]:.1%}" for i in (3, 0, -1))],
    ]


def test_a_directory_in_use_is_refused(tmp_path):
    workdir = Workdir(tmp_path / "run")
    with workdir.claimed(small_config()), pytest.raises(ValueError, match=r"is in use by another"):
        train(small_config(), workdir.path)
    with workdir.claimed(small_config()):
        pass  # and is free afterwards


class TestOwner:
    """A directory is one run's, on whatever machine; an owner that is gone is in nobody's way."""

    OTHER = {"host": "far", "machine": "another", "pid": 7, "began": "2020-01-01 00:00:00 +0000"}

    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch):
        monkeypatch.setattr(owner, "BEAT", 0.05)
        monkeypatch.setattr(owner, "PATIENCE", 1.0)

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / owner.FILE).write_text(json.dumps(self.OTHER))
        return tmp_path

    def test_it_shows_that_it_is_at_work_and_leaves_nothing(self, tmp_path):
        said = []
        with owner.owned(tmp_path, said.append):
            first = (tmp_path / owner.FILE).read_text()
            assert json.loads(first)["pid"] == os.getpid()
            time.sleep(0.5)
            later = (tmp_path / owner.FILE).read_text()
            assert later != first
            assert len(later) == len(first)
        assert (list(tmp_path.iterdir()), said) == ([], [])

    def test_one_at_work_on_another_machine_is_left_alone(self, path):
        with contextlib.ExitStack() as stack:
            ended = threading.Event()
            thread = threading.Thread(target=self.live, args=(path, ended))
            thread.start()
            stack.callback(thread.join)
            stack.callback(ended.set)
            with (
                pytest.raises(ValueError, match=r"in use by process 7 on far, which began at 2020"),
                owner.owned(path, print),
            ):
                pytest.fail("it was taken")
        assert json.loads((path / owner.FILE).read_text())["host"] == "far"

    def live(self, path, ended):
        beat = 0
        while not ended.wait(0.1):
            beat += 1
            (path / owner.FILE).write_text(json.dumps({**self.OTHER, "beat": beat}))

    def test_one_that_is_gone_is_succeeded(self, path):
        said = []
        with owner.owned(path, said.append):
            assert json.loads((path / owner.FILE).read_text())["pid"] == os.getpid()
        assert "is that of process 7 on far: watching" in said[0]
        assert said[1:] == ["process 7 on far is gone: this run takes over"]

    def test_one_that_was_killed_on_this_machine_is_succeeded_at_once(self, path, monkeypatch):
        monkeypatch.setattr(owner, "PATIENCE", 1000.0)
        here = {**self.OTHER, "machine": owner._machine()}
        (path / owner.FILE).write_text(json.dumps(here))
        said = []
        with owner.owned(path, said.append):
            assert said == []

    @pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
    def test_without_locks_the_file_decides(self, tmp_path, monkeypatch, error):
        def flock(*_):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(fcntl, "flock", flock)
        said = []
        with (
            owner.owned(tmp_path, said.append),
            pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on "),
            owner.owned(tmp_path, print),
        ):
            pytest.fail("it was taken")
        assert len(said) == 1
        assert "without locks" in said[0]

    def test_a_damaged_file_is_one_of_somebody_unknown(self, path):
        (path / owner.FILE).write_bytes(b"\xff{")
        said = []
        with owner.owned(path, said.append):
            assert "process ? on ?" in said[0]

    def test_a_new_run_after_one_that_was_killed_before_it_claimed(self, path, capsys):
        with Workdir(path).claimed(small_config()):
            assert (path / "config.json").exists()
        assert "takes over" in capsys.readouterr().out


def test_a_signal_inside_evaluation_saves_and_stops_there(straight, tmp_path, monkeypatch, capsys):
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
    config = small_config()
    chex.assert_trees_all_equal(final_state(path, config), final_state(straight[0], config))
    assert numbers(path) == numbers(straight[0])


def test_a_trace_of_some_steps(straight, tmp_path, capsys):
    path = tmp_path / "run"
    train(small_config(train__epochs=1), path, profile_steps=parse_steps("3:5"))
    assert f"trace: {path / 'profile'}" in capsys.readouterr().out
    assert list((path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["3", "5:3", "0:4", "a:b", "-1:3"])
def test_steps_that_cannot_be_traced(text):
    with pytest.raises(ValueError, match=rf"--profile_steps={text} is not FIRST:END"):
        parse_steps(text)
    assert parse_steps("") == range(0)


class TestAssessment:
    """`--eval_only`: the same numbers as at the end of training, in both forms."""

    def test_a_run(self, straight):
        found = assess(small_config(), straight[0])
        last = rows(straight[0])[-1]
        for name in ("accuracy", "loss", "top5"):
            assert found.trained[name] == pytest.approx(last[f"final/{name}"], rel=1e-6)
            assert found.fused[name] == pytest.approx(last[f"final/{name}_fused"], rel=1e-6)
        lines = found.lines(by_class=True)
        assert lines[0] == f"step 22 of {straight[0]}: 360 images"
        assert len(lines) == 2 + 3 + 10

    def test_an_earlier_step_at_another_batch(self, straight):
        found = assess(small_config(eval__batch_size=360), straight[0], step=11)
        row = next(r for r in rows(straight[0]) if r["step"] == 11 and "eval/loss" in r)
        assert found.trained["accuracy"] == pytest.approx(row["eval/accuracy"], rel=1e-6)

    def test_a_file(self, straight, tmp_path):
        variables = final_state(straight[0], small_config()).variables
        save_weights(tmp_path / "w.npz", fuse_params(variables), family="flax", variant=SMALL)
        nothing = tmp_path / "nothing"
        found = assess(small_config(), nothing, init_from=str(tmp_path / "w.npz"))
        last = rows(straight[0])[-1]
        assert found.fused["accuracy"] == pytest.approx(last["final/accuracy_fused"], rel=1e-6)

    def test_a_head_of_other_classes(self, straight, tmp_path):
        variables = final_state(straight[0], small_config()).variables
        head = {"kernel": np.zeros((16, 7), np.float32), "bias": np.zeros(7, np.float32)}
        other = {**variables, "params": {**variables["params"], "head": head}}
        save_weights(tmp_path / "w.npz", other, family="flax", variant=SMALL)
        with pytest.raises(ValueError, match=r"has no head for the 10 classes of digits"):
            assess(small_config(), tmp_path / "nothing", init_from=str(tmp_path / "w.npz"))

    def test_another_network(self, straight):
        with pytest.raises(ValueError, match=r"another network: config\.ema\.decay: 0.0 -> 0.9"):
            assess(small_config(ema__decay=0.9), straight[0])

    def test_another_optimiser_makes_no_difference(self, straight):
        other = small_config(optimizer__name="adamw", optimizer__clip_norm=1.0)
        found = assess(other, straight[0])
        assert found.trained["accuracy"] == straight[1].accuracy

    def test_a_fine_tuned_run_is_not_what_it_started_from(self, straight):
        found = assess(small_config(init_from="somebody.pth"), straight[0])
        assert found.source == f"step 22 of {straight[0]}"
        assert found.trained["accuracy"] == straight[1].accuracy

    def test_a_run_without_a_checkpoint(self, straight, tmp_path):
        shutil.copytree(straight[0], tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        with pytest.raises(ValueError, match=r"run holds no checkpoint yet; train there first"):
            assess(small_config(), tmp_path / "run")

    def test_images_that_cannot_be_decoded_are_not_counted(
        self, straight, tmp_path, monkeypatch, capsys
    ):
        def one_is_bad(*args, **options):
            for number, batch in enumerate(eval_batches(*args, **options)):
                bad = np.arange(len(batch["mask"])) == (3 if number == 0 else -1)
                yield {**batch, "mask": batch["mask"] & ~bad}

        monkeypatch.setattr(evaluation, "eval_batches", one_is_bad)
        shutil.copytree(straight[0], tmp_path / "run")
        found = assess(small_config(), tmp_path / "run")
        assert found.lines()[0] == f"step 22 of {tmp_path / 'run'}: 359 of 360 images"
        outcome = train(small_config(), tmp_path / "run")
        assert "fused (359 of 360 images)" in capsys.readouterr().out
        assert outcome.accuracy == found.trained["accuracy"]
        right = outcome.accuracy * 359
        assert right == pytest.approx(round(right), abs=1e-3)

    def test_no_such_step(self, straight):
        with pytest.raises(ValueError, match=r"no checkpoint of step 5; there are those of 11, 22"):
            assess(small_config(), straight[0], step=5)


class Killed(BaseException):
    """As abrupt as it gets inside one process."""


@pytest.mark.parametrize("at", [1, 11, 12, 17])
def test_a_killed_run_continues_and_ends_with_the_same_bits(straight, tmp_path, monkeypatch, at):
    path = tmp_path / "run"
    real = report.Report.step

    def dies(self, step, row):
        real(self, step, row)
        if step == at:
            raise Killed

    monkeypatch.setattr(report.Report, "step", dies)
    with pytest.raises(Killed):
        train(small_config(), path)
    monkeypatch.setattr(report.Report, "step", real)
    train(small_config(), path)
    config = small_config()
    chex.assert_trees_all_equal(final_state(path, config), final_state(straight[0], config))
    assert numbers(path) == numbers(straight[0])


def test_sigterm_saves_stops_and_continues_with_the_same_bits(
    straight, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "run"
    real = report.Report.step

    def signals(self, step, row):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(report.Report, "step", signals)
    outcome = train(small_config(), path)
    assert (outcome.step, outcome.stopped_by, outcome.accuracy) == (7, signal.SIGTERM, None)
    assert "SIGTERM at step 7: saved; the same command continues" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(report.Report, "step", real)
    outcome = train(small_config(), path)
    assert "continuing from step 7 of 22" in capsys.readouterr().out
    config = small_config()
    chex.assert_trees_all_equal(final_state(path, config), final_state(straight[0], config))
    assert outcome.accuracy == straight[1].accuracy


@pytest.mark.parametrize("at", ["start", "restore"])
def test_a_signal_while_a_run_starts_waits_for_the_first_question(
    straight, tmp_path, monkeypatch, capsys, at
):
    path, real = tmp_path / "run", Checkpoints.restore
    if at == "restore":
        shutil.copytree(straight[0], path)
        shutil.rmtree(path / "checkpoints" / "22")

    def signals(self, like, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, like, **options)

    monkeypatch.setattr(Checkpoints, "restore", signals)
    step = 0 if at == "start" else 11
    outcome = train(small_config(), path)
    assert (outcome.step, outcome.stopped_by) == (step, signal.SIGTERM)
    out = capsys.readouterr().out
    assert f"SIGTERM at step {step}: nothing new to save; the same command continues" in out
    assert "compiled" not in out
    monkeypatch.setattr(Checkpoints, "restore", real)
    train(small_config(), path)
    config = small_config()
    chex.assert_trees_all_equal(final_state(path, config), final_state(straight[0], config))
    assert numbers(path) == numbers(straight[0])


def test_a_finished_run_only_reports_again(straight, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(straight[0], path)
    assert train(small_config(), path) == straight[1]
    assert "compiled" not in capsys.readouterr().out
    assert numbers(path) == numbers(straight[0])


def test_another_configuration_is_refused_with_the_difference(straight):
    before = rows(straight[0])
    other = small_config(optimizer__momentum=0.5, seed=9)
    with pytest.raises(ValueError, match=r"momentum: 0.9 -> 0.5; config.seed: 0 -> 9.*--workdir"):
        train(other, straight[0])
    assert rows(straight[0]) == before


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"no run's directory .* holds thesis\.tex"):
        train(small_config(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_nan_stops_the_run_after_it_was_written_down(tmp_path):
    config = small_config(optimizer__learning_rate=1e30, checkpoint__every_epochs=1)
    with pytest.raises(FloatingPointError) as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert "the last good checkpoint is none" in message
    assert "learning_rate (now 1e+30)" in message
    bad = rows(tmp_path / "run")[-1]
    assert message.startswith(f"step {bad['step']}: ")
    assert None in bad.values()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_number_of_devices_is_announced(straight, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(straight[0], path)
    shutil.rmtree(path / "checkpoints" / "22")
    train(small_config(), path)
    assert "it was saved by" not in capsys.readouterr().out
    shutil.rmtree(path / "checkpoints" / "22")
    manifest = path / "checkpoints" / "11" / "manifest" / "metadata"
    saved = Manifest.read(path / "checkpoints" / "11")
    assert saved.saved_on == "8 cpu devices in 1 process"
    other = dataclasses.replace(saved, saved_on="4 tpu devices in 2 processes")
    manifest.write_text(json.dumps(other.content()))
    train(small_config(), path)
    assert "it was saved by 4 tpu devices in 2 processes: from" in capsys.readouterr().out


def test_train_sizes_by_epoch():
    config = small_config(data__train_size=24, data__sizes=((0, 16), (2, 24), (5, 32)))
    sizes = Run.from_config(config).size_at
    assert [sizes(epoch) for epoch in range(7)] == [16, 16, 24, 24, 24, 32, 32]
    assert pickle.loads(pickle.dumps(sizes)) == sizes  # it goes to the processes that read
    with pytest.raises(ValueError, match=r"data.sizes=.* must start with epoch 0 and go up"):
        configs.check(small_config(data__sizes=((1, 16),)), devices=8)


@pytest.mark.slow
def test_a_run_whose_images_grow(tmp_path, capsys):
    config = small_config(
        data__source="fake",
        data__mean=(0.5,) * 3,
        data__std=(0.3,) * 3,
        data__train_size=24,
        data__sizes=((0, 16), (1, 24)),
        data__workers=1,
        augment__mixup=0.2,
        augment__policy="raug15",
    )
    train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "compiled for images of 16x16 in" in out
    assert "compiled for images of 24x24 in" in out
    assert rows(tmp_path / "run")[-1]["step"] == 8


class TestInitFrom:
    """Fine-tuning starts from whatever somebody trained, and says from what."""

    def start(self, source):
        config = small_config(init_from=str(source))
        return starting_state(Run.from_config(config))

    def test_another_run(self, straight):
        state, line = self.start(straight[0])
        trained = final_state(straight[0], small_config())
        chex.assert_trees_all_equal(jax.device_get(state.variables), trained.variables)
        assert int(state.step) == 0
        assert line.startswith("starting from small, training form, 10 classes")
        assert line.endswith(f"({straight[0]})")
        assert "fresh" not in line

    @pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
    def test_a_file_of_the_authors_names(self, straight, tmp_path, suffix):
        trained = final_state(straight[0], small_config()).variables
        save_weights(tmp_path / f"w{suffix}", trained, family="official", variant=SMALL)
        state, _ = self.start(tmp_path / f"w{suffix}")
        chex.assert_trees_all_equal(jax.device_get(state.variables), trained)

    def test_a_file_in_deploy_form(self, straight, tmp_path):
        trained = final_state(straight[0], small_config()).variables
        deployed = fuse_params(trained)
        save_weights(tmp_path / "w.safetensors", deployed, family="flax", variant=SMALL)
        state, line = self.start(tmp_path / "w.safetensors")
        back = jax.device_get(fuse_params(state.variables))
        chex.assert_trees_all_close(back, deployed, rtol=1e-5, atol=1e-5)
        assert "deploy form split into three branches" in line

    def test_other_classes_replace_the_head(self, straight, tmp_path):
        trained = final_state(straight[0], small_config()).variables
        head = {"kernel": np.zeros((16, 7), np.float32), "bias": np.zeros(7, np.float32)}
        other = {**trained, "params": {**trained["params"], "head": head}}
        save_weights(tmp_path / "w.npz", other, family="flax", variant=SMALL)
        state, line = self.start(tmp_path / "w.npz")
        assert state.params["head"]["kernel"].shape == (16, 10)
        assert "freshly initialized: head" in line
        np.testing.assert_array_equal(
            state.params["stem"]["conv3x3"]["kernel"],
            trained["params"]["stem"]["conv3x3"]["kernel"],
        )

    def test_training_says_what_it_starts_from_and_starts_there(self, straight, tmp_path, capsys):
        config = small_config(init_from=str(straight[0]), optimizer__learning_rate=0.0)
        outcome = train(config, tmp_path / "run")
        assert "starting from small, training form" in capsys.readouterr().out
        state = final_state(tmp_path / "run", config)
        chex.assert_trees_all_equal(state.params, final_state(straight[0], small_config()).params)
        assert outcome.step == 22

    @pytest.mark.parametrize("source", ["nothing.pth", "repvgg_z9.rvgg_in1k"])
    def test_nothing_there(self, source):
        with pytest.raises(ValueError, match=source):
            self.start(source)


def test_what_other_processes_say(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    silent = report.Report(Workdir(tmp_path), title="", config={}, start_step=0, total_steps=1)
    silent.say("what all know")
    silent.say_for_itself("an image [3] is bad " + "x" * 200)
    silent.close()
    assert capsys.readouterr().out == f"process 3: an image [3] is bad {'x' * 200}\n"
    assert not list(tmp_path.iterdir())


def test_what_a_person_sees(tmp_path, capsys):
    train(small_config(train__epochs=1), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("RepVGG small (float32) on 8 cpu devices: digits, 1,437 images")
    assert "1 epochs of 11 steps, batch 128 (16 a device" in lines[0]
    assert lines[1].startswith("compiled in ")
    assert all(w in lines[2] for w in ("step 4/11", "loss", "accuracy", "images/s", "data-wait"))
    assert "as trained" in lines[-3]
    assert "fused (360 images)" in lines[-3]
    assert lines[-1] == f"next: python convert.py --workdir {tmp_path / 'run'} --output deploy"


def test_training_walks_back_and_says_so(straight, tmp_path, capsys, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    files = (workdir / "checkpoints" / "22" / "state").rglob("*")
    file = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-9])
    train(small_config(), workdir)
    assert "22 is corrupt" in caplog.text
    assert "continuing from step 11 of 22" in capsys.readouterr().out
    config = small_config()
    chex.assert_trees_all_equal(final_state(workdir, config), final_state(straight[0], config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json cannot be read: Expecting"),
        (
            "[]",
            r"cannot be read: .*missing \[config\.augment\.affine\.rotation, .*unknown \[config\]",
        ),
        ('{"seed": 3}', r"cannot be read: .*missing \[config\.augment\.affine\.rotation, "),
    ],
)
def test_workdir_of_a_damaged_configuration(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Workdir(tmp_path).read_config()


def test_a_configuration_survives_the_way_through_its_file(tmp_path):
    Workdir(tmp_path / "run").claim(small_config())
    again = Workdir(tmp_path / "run").read_config()
    assert configs.plain(again) == configs.plain(small_config())
    assert configs.variant_of(again) == SMALL


def test_the_loop_has_no_word_for_a_block():
    """Training knows networks and tasks, not RepVGG's insides."""
    folder = pathlib.Path(loop.__file__).parent
    for file in folder.glob("*.py"):
        code = file.read_text()
        assert "conv3x3" not in code
        assert "reparam" not in code
