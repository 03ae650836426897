"""The recipe of the digits, killed again and again; test_readme.py trains it to its accuracy."""

import os
import pathlib
import signal
import subprocess
import sys

import chex
import pytest

from configs.digits import get_config
from tests.helpers.commands import ROOT, run
from tests.helpers.flags import xla_flags
from tests.helpers.runs import final_state, rows

pytestmark = pytest.mark.slow


# Where and at which time that it comes there the process is killed, one after the other. An epoch
# has 22 steps; a run that resumes begins at the last one that was saved. What is left on disk at
# any other instant is the subject of test_training_damage.py, in one process.
KILLS = [
    ("stepping", 7),
    ("saving", 1),
    ("restoring", 1),
    ("reporting", 23),  # after the row of the evaluation, before the checkpoint
]


@pytest.mark.timeout(1800)
def test_killed_at_many_places_it_ends_bitwise_identical(tmp_path):
    """SIGKILL while the process starts, steps, reports and saves."""
    arguments = [
        "--config.train.epochs=2",
        "--config.optimizer.warmup_epochs=1",
        "--config.ema.decay=0.98",
        "--config.report.every_steps=1",
    ]
    status, _, err = run("train.py", *arguments, "--workdir=straight", cwd=tmp_path)
    assert (status, err) == (0, "")
    for place, count in KILLS:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.helpers.killed", place, str(count)),
                *arguments,
                "--workdir=killed",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, (place, count, done.stdout, done.stderr)
    status, _, err = run("train.py", *arguments, "--workdir=killed", cwd=tmp_path)
    assert (status, err) == (0, "")

    config = get_config()
    config.train.epochs, config.optimizer.warmup_epochs, config.ema.decay = 2, 1, 0.98
    states = [final_state(tmp_path / name, config) for name in ("straight", "killed")]
    assert set(states[0].ema) == {"params", "batch_stats"}
    chex.assert_trees_all_equal(*states)
    assert _numbers(tmp_path / "straight") == _numbers(tmp_path / "killed")


def _numbers(path: pathlib.Path) -> list[dict]:
    return [{k: v for k, v in row.items() if "/" in k or k == "step"} for row in rows(path)]
