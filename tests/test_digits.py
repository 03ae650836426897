"""The recipe of the digits, whole: what the README and docs/results.md promise of it."""

import json
import pathlib
import random
import signal
import statistics
import time

import chex
import jax
import pytest
from absl import logging

from configs.digits import get_config
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.loop import train
from repvgg_jax.train.run import Run
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


EPOCHS = 84  # more than twenty kills, each within four epochs, can finish


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times_at_random_instants_it_ends_with_the_same_bits(tmp_path):
    """SIGKILL, wherever the process is: starting, compiling, stepping, evaluating, saving."""
    arguments = [
        f"--config.train.epochs={EPOCHS}",
        "--config.ema.decay=0.98",
        "--config.report.every_steps=1",
    ]
    to_first_step, epoch = _straight(arguments, tmp_path)
    moments = random.Random(0)
    for _ in range(20):
        process = start("train.py", *arguments, "--workdir=killed", cwd=tmp_path)
        # However fast the machine is by now, before it has gone through three epochs.
        rows = _rows(tmp_path / "killed")
        deadline = time.monotonic() + moments.uniform(
            0.3 * to_first_step, to_first_step + 2 * epoch
        )
        while time.monotonic() < deadline and _rows(tmp_path / "killed") < rows + 3 * 22:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    status, _, err = run("train.py", *arguments, "--workdir=killed", cwd=tmp_path)
    assert (status, err) == (0, "")

    config = get_config()
    config.train.epochs, config.ema.decay = EPOCHS, 0.98
    like = Run.from_config(config).abstract_state()
    states, rows = [], []
    for name in ("straight", "killed"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            states.append(jax.device_get(checkpoints.restore(like)))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append(
            [
                {k: v for k, v in json.loads(line).items() if "/" in k or k == "step"}
                for line in lines
            ]
        )
    assert set(states[0].ema) == {"params", "batch_stats"}
    chex.assert_trees_all_equal(*states)
    assert rows[0] == rows[1]


def _rows(path: pathlib.Path) -> int:
    """How many there are in a run's metrics, of which each step adds one."""
    metrics = path / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def _straight(arguments: list[str], cwd: pathlib.Path) -> tuple[float, float]:
    """Seconds until the first step and of an epoch, of a run that nothing interrupts."""
    began = time.monotonic()
    process = start("train.py", *arguments, "--workdir=straight", cwd=cwd)
    metrics = cwd / "straight" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    first = time.monotonic()
    _, err = process.communicate(timeout=900)
    assert (process.returncode, err) == (0, "")
    return first - began, (time.monotonic() - first) / EPOCHS
