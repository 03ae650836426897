"""Every benchmark starts from a fresh checkout, where the package is not installed."""

import os
import pathlib
import subprocess
import sys

import pytest

_FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
_SCRIPTS = [path for path in sorted(_FOLDER.glob("*.py")) if "def main()" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: path.stem)
def test_starts_anywhere(script: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its options are explained, with no help from the search path or the working directory."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--write" in done.stdout
