"""Evaluation without training: the same numbers as at the end of training, in both forms."""

import logging
import shutil

import numpy as np
import pytest

from repvgg_jax import fuse_params, save_weights
from repvgg_jax.data.batches import eval_batches
from repvgg_jax.train import evaluate
from repvgg_jax.train.evaluate import evaluate_only
from repvgg_jax.train.loop import train
from tests.helpers.runs import SMALL, final_state, rows, small_config


def test_a_run(small_run):
    found = evaluate_only(small_config(), small_run[0])
    last = rows(small_run[0])[-1]
    for name in ("accuracy", "loss", "top5"):
        assert found.trained[name] == pytest.approx(last[f"final/{name}"], rel=1e-6)
        assert found.fused[name] == pytest.approx(last[f"final/{name}_fused"], rel=1e-6)
    lines = found.lines(by_class=True)
    assert lines[0] == f"step 22 of {small_run[0]}: 360 images"
    assert len(lines) == 2 + 4 + 1 + 10


def test_an_earlier_step_at_another_batch(small_run):
    found = evaluate_only(small_config(eval__batch_size=360), small_run[0], step=11)
    row = next(r for r in rows(small_run[0]) if r["step"] == 11 and "eval/loss" in r)
    assert found.trained["accuracy"] == pytest.approx(row["eval/accuracy"], rel=1e-6)


def test_a_file(small_run, tmp_path):
    variables = final_state(small_run[0]).variables
    save_weights(tmp_path / "w.npz", fuse_params(variables), family="flax", variant=SMALL)
    nothing = tmp_path / "nothing"
    found = evaluate_only(small_config(), nothing, init_from=str(tmp_path / "w.npz"))
    last = rows(small_run[0])[-1]
    assert found.fused["accuracy"] == pytest.approx(last["final/accuracy_fused"], rel=1e-6)


def test_a_head_of_other_classes(small_run, tmp_path):
    variables = final_state(small_run[0]).variables
    head = {"kernel": np.zeros((16, 7), np.float32), "bias": np.zeros(7, np.float32)}
    other = {**variables, "params": {**variables["params"], "head": head}}
    save_weights(tmp_path / "w.npz", other, family="flax", variant=SMALL)
    with pytest.raises(ValueError, match=r"no head for the 10 classes of digits"):
        evaluate_only(small_config(), tmp_path / "nothing", init_from=str(tmp_path / "w.npz"))


def test_another_network(small_run):
    with pytest.raises(ValueError, match=r"config\.ema\.decay: 0.0 -> 0.9"):
        evaluate_only(small_config(ema__decay=0.9), small_run[0])


def test_another_optimizer_makes_no_difference(small_run):
    other = small_config(optimizer__name="adamw", optimizer__clip_norm=1.0)
    found = evaluate_only(other, small_run[0])
    assert found.trained["accuracy"] == small_run[1].accuracy


def test_a_fine_tuned_run_is_not_what_it_started_from(small_run):
    found = evaluate_only(small_config(init_from="somebody.pth"), small_run[0])
    assert found.source == f"step 22 of {small_run[0]}"
    assert found.trained["accuracy"] == small_run[1].accuracy


def test_a_run_without_a_checkpoint(small_run, tmp_path):
    shutil.copytree(small_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"no checkpoint"):
        evaluate_only(small_config(), tmp_path / "run")


def test_images_that_cannot_be_decoded_are_not_counted(small_run, tmp_path, monkeypatch, caplog):
    def one_is_bad(*args, **options):
        for number, batch in enumerate(eval_batches(*args, **options)):
            bad = np.arange(len(batch["mask"])) == (3 if number == 0 else -1)
            yield {**batch, "mask": batch["mask"] & ~bad}

    monkeypatch.setattr(evaluate, "eval_batches", one_is_bad)
    shutil.copytree(small_run[0], tmp_path / "run")
    found = evaluate_only(small_config(), tmp_path / "run")
    assert found.lines()[0] == f"step 22 of {tmp_path / 'run'}: 359 of 360 images"
    caplog.set_level(logging.INFO, logger="repvgg_jax")
    outcome = train(small_config(), tmp_path / "run")
    assert "fused (359 of 360 images)" in caplog.text
    assert outcome.accuracy == found.trained["accuracy"]
    right = outcome.accuracy * 359
    assert right == pytest.approx(round(right), abs=1e-3)


def test_no_such_step(small_run):
    with pytest.raises(ValueError, match=r"step 5.* 11, 22"):
        evaluate_only(small_config(), small_run[0], step=5)


def test_data_with_other_classes(small_run):
    other = small_config(data__source="fake", data__mean=(0.5,) * 3, data__std=(0.3,) * 3)
    with pytest.raises(ValueError, match=r"fake has other.* 10 classes -> 4"):
        evaluate_only(other, small_run[0])
