"""Resuming with other settings: those that may change, and longer runs."""

import dataclasses
import json
import logging
import shutil

import chex
import numpy as np
import pytest

from repvgg_jax.train import resume
from repvgg_jax.train.loop import train
from repvgg_jax.train.workdir import Workdir
from tests.helpers.runs import final_state, rows, small_config, small_experiment, small_settings


def check(given, *, extend=False, known_data=True, **stored):
    return resume.check_changes(
        small_settings(**stored), given, owner="run", extend=extend, known_data=known_data
    )


def test_how_a_run_is_read_and_written_may_change(small_run, tmp_path, caplog):
    """It ends with the same bits."""
    caplog.set_level(logging.INFO, logger="repvgg_jax")
    path = tmp_path / "run"
    shutil.copytree(small_run[0], path)
    shutil.rmtree(path / "checkpoints" / "22")
    config = small_config(
        data__threads=3,
        data__max_bad=2,
        data__max_pixels=10**9,
        eval__batch_size=360,
        checkpoint__keep=1,
        report__every_steps=1,
    )
    train(config, path)
    chex.assert_trees_all_equal(final_state(path), final_state(small_run[0]))
    assert "config.data.threads: 1 -> 3" in caplog.text
    assert Workdir(path).read_settings().report.every_steps == 1
    assert not (path / "checkpoints" / "11").exists()
    assert [row["step"] for row in rows(path) if "train/loss" in row][-3:] == [20, 21, 22]


@pytest.mark.parametrize(("platform", "form"), [("cpu", "branches"), ("tpu", "covariance")])
def test_a_run_goes_on_in_the_training_pass_it_started_with(platform, form):
    """Wherever it is resumed, if the recipe leaves the choice."""
    begun = resume.started(small_settings(), platform)
    assert begun.model.train_form == form
    given = small_settings()
    assert given.model.train_form == "auto"
    changes = resume.check_changes(begun, given, owner="run", extend=False, known_data=True)
    assert not changes
    assert resume.resumed(begun, given, step=3, images=1000) == begun
    other = small_settings(model__train_form={"cpu": "covariance", "tpu": "branches"}[platform])
    with pytest.raises(ValueError, match=f"train_form: '{form}' -> "):
        resume.check_changes(begun, other, owner="run", extend=True, known_data=True)


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"optimizer__momentum": 0.5}, {"extend": True}, r"momentum: 0.9 -> 0.5\. Give another"),
        ({"train__epochs": 3}, {}, r"epochs: 2 -> 3\. Give --extend"),
        ({"train__batch_size": 64}, {}, r"batch_size: 128 -> 64\. Give --extend"),
        ({"train__epochs": 3, "seed": 1}, {}, r"seed: 0 -> 1\. Give another"),
        ({"data__eval_crop": 0.5}, {}, "eval_crop"),
        ({"data__source": "fake"}, {"known_data": False}, "source"),
    ],
)
def test_what_must_not_change(changed, options, message):
    with pytest.raises(ValueError, match=message):
        check(small_settings(**changed), **options)


def test_what_may_change():
    assert check(small_settings()) == []
    assert len(check(small_settings(data__source="fake", data__workers=2))) == 2
    # Options of a TPU's compiler stop a run on any other platform.
    stored = small_settings(train__compiler_options=("xla_tpu_x=1",))
    changes = resume.check_changes(
        stored, small_settings(), owner="x", extend=False, known_data=True
    )
    assert len(changes) == 1
    assert len(check(small_settings(train__epochs=3, train__batch_size=64), extend=True)) == 2


def test_a_longer_run_has_the_rates_of_one_that_was_longer_from_its_start():
    longer = small_experiment(train__epochs=4)
    assert longer.total_steps == 44
    # Half the batch from the end of the first epoch, 11 steps, on.
    stored, given = small_settings(), small_settings(train__batch_size=64, train__epochs=3)
    settings = resume.resumed(stored, given, step=11, images=1437)
    assert settings.train.step_offset == 11
    found = small_experiment(train__batch_size=64, train__epochs=3, train__step_offset=11)
    whole = small_experiment(train__batch_size=64, train__epochs=3)
    assert (whole.total_steps, found.total_steps) == (66, 55)
    for step in (12, 13, 40, 55):
        assert found.learning_rate(step) == whole.learning_rate(step + 11)
        assert found.is_due(1, step) == whole.is_due(1, step + 11)
    # Back to the whole batch in the middle of an epoch, at the nearest batch.
    again = resume.resumed(found.settings, small_settings(), step=20, images=1437)
    assert again.train.step_offset == round(31 / 22 * 11) - 20
    assert resume.started(found.settings, "cpu").train.step_offset == 0


def test_other_data_keep_the_place_in_the_schedule():
    """Twice the images are twice the steps per epoch; the epoch stays what it is."""
    settings = resume.resumed(
        small_settings(), small_settings(), step=11, images=2 * 1437, images_before=1437
    )
    assert settings.train.step_offset == 11
    half = resume.resumed(settings, small_settings(), step=33, images=1437, images_before=2 * 1437)
    assert half.train.step_offset == 22 - 33
    same = resume.resumed(settings, small_settings(), step=20, images=2874, images_before=2874)
    assert same.train.step_offset == 11
    with pytest.raises(ValueError, match=r"100 training images are fewer .*batch_size=128"):
        resume.resumed(small_settings(), small_settings(), step=10, images=100)


def test_a_length_that_is_over():
    with pytest.raises(ValueError, match=r"epochs=1 .* epoch 2"):
        resume.resumed(small_settings(), small_settings(train__epochs=1), step=22, images=1437)


@pytest.mark.slow
def test_a_finished_run_is_extended(small_run, tmp_path, caplog):
    """With a constant rate, the bits are those of a run that was longer from its start."""
    caplog.set_level(logging.INFO, logger="repvgg_jax")

    def config(epochs):
        return small_config(optimizer__schedule="constant", train__epochs=epochs)

    train(config(2), tmp_path / "long")
    train(config(1), tmp_path / "short")
    with pytest.raises(ValueError, match="--extend"):
        train(config(2), tmp_path / "short")
    outcome = train(config(2), tmp_path / "short", extend=True)
    assert outcome.step == 22
    ends = [final_state(tmp_path / name, config(2)) for name in ("short", "long")]
    chex.assert_trees_all_equal(*ends)
    assert "extended: epoch 1 to 2" in caplog.text
    assert sum("final/accuracy" in row for row in rows(tmp_path / "short")) == 1
    assert train(config(2), tmp_path / "short") == outcome  # it is that run now


@pytest.mark.slow
def test_another_batch_size_goes_on_where_the_run_was(small_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(small_run[0], path)
    shutil.rmtree(path / "checkpoints" / "22")
    config = small_config(train__batch_size=64)
    outcome = train(config, path, extend=True)
    assert outcome.step == 11 + 22
    last = rows(path)[-2]
    assert (last["step"], last.get("epoch", 2.0)) == (33, 2.0)
    assert Workdir(path).read_settings().train.step_offset == 11
    end = final_state(path, config)
    shutil.rmtree(path / "checkpoints" / "33")
    assert train(config, path) == outcome  # resumed, without --extend
    chex.assert_trees_all_equal(final_state(path, config), end)
    # A new run with the recipe of this one starts at its start.
    other = dataclasses.replace(Workdir(path).read_settings(), seed=1)
    assert resume.started(other, "cpu").train.step_offset == 0


def test_a_config_of_a_version_without_offset(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim(small_settings())
    content = json.loads(workdir.config.read_text())
    del content["train"]["step_offset"]
    workdir.config.write_text(json.dumps(content))
    assert workdir.read_settings() == small_settings()
    assert np.isfinite(small_experiment().learning_rate(1))
