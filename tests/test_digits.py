"""The recipe of the digits, whole: what the README and docs/results.md promise of it."""

import json
import random
import signal
import statistics
import time

import chex
import jax
import pytest
from absl import logging

from configs.digits import get_config
from repvgg_jax.training.checkpoint import Checkpoints
from repvgg_jax.training.loop import train
from repvgg_jax.training.run import Run
from tests.test_cli import run, start


@pytest.mark.slow
def test_mean_accuracy_of_five_seeds(tmp_path):
    outcomes = []
    for seed in range(5):
        config = get_config()
        config.seed = seed
        outcomes.append(train(config, tmp_path / str(seed)))
    logging.info("held-out accuracies: %s", [o.accuracy for o in outcomes])
    assert all(outcome.accuracy == outcome.accuracy_fused for outcome in outcomes)
    assert statistics.mean(outcome.accuracy for outcome in outcomes) >= 0.985


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_with_the_same_bits(tmp_path):
    """SIGKILL, wherever the process is: compiling, stepping, evaluating, saving."""
    arguments = ["--config.train.epochs=6", "--config.report.every_steps=1"]
    status, _, err = run("train.py", *arguments, "--workdir=straight", cwd=tmp_path)
    assert (status, err) == (0, "")
    moments = random.Random(0)
    kills = 0
    for _ in range(20):
        process = start("train.py", *arguments, "--workdir=killed", cwd=tmp_path)
        time.sleep(moments.uniform(4, 10))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills >= 2
    status, _, err = run("train.py", *arguments, "--workdir=killed", cwd=tmp_path)
    assert (status, err) == (0, "")

    states, rows = [], []
    for name in ("straight", "killed"):
        config = get_config()
        config.train.epochs = 6
        like = Run.from_config(config).abstract_state()
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            states.append(jax.device_get(checkpoints.restore(like)))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append(
            [
                {k: v for k, v in json.loads(line).items() if "/" in k or k == "step"}
                for line in lines
            ]
        )
    chex.assert_trees_all_equal(*states)
    assert rows[0] == rows[1]
