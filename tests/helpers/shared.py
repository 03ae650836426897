"""Fixtures that are made once per session, whichever workers of pytest-xdist use them."""

import fcntl
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.commands import SHORT, run


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], Any]
) -> tuple[pathlib.Path, Any]:
    """A directory that the first worker fills, and what `make` returned there."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # common to all workers
    folder, result = base / name, base / f"{name}.pickle"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            folder.mkdir()
            made = make(folder)
            result.write_bytes(pickle.dumps(made))
        return folder, pickle.loads(result.read_bytes())


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> tuple[pathlib.Path, Any]:
    """A run of `small_config` that nothing interrupted, and its outcome. Do not write there."""
    from repvgg_jax.train.loop import train  # tests of the core alone do not import it
    from tests.helpers.runs import small_config

    folder, outcome = made_once(
        tmp_path_factory, "small_run", lambda folder: train(small_config(), folder / "run")
    )
    return folder / "run", outcome


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> pathlib.Path:
    """A directory with runs/digits in it: an epoch, by the bare command. Do not write there."""

    def make(folder: pathlib.Path) -> str:
        status, out, err = run("train.py", *SHORT, cwd=folder)
        assert (status, err) == (0, "")
        return out

    return made_once(tmp_path_factory, "digits_run", make)[0]
