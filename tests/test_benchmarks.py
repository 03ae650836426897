"""Every benchmark starts from a fresh checkout, where the package is not installed."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

_FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
_SCRIPTS = [path for path in sorted(_FOLDER.glob("*.py")) if "def main()" in path.read_text()]


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: path.stem)
def test_finds_the_package(script: pathlib.Path) -> None:
    """The harness, which puts the package on the search path, is imported before it."""
    imported = [
        name
        for node in ast.parse(script.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else _names(node))
    ]
    package = [i for i, name in enumerate(imported) if name.startswith("repvgg_jax")]
    assert "harness" in imported
    assert imported.index("harness") < min(package, default=len(imported))


def _names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["augmentation", "traffic"])
def test_starts_anywhere(script: str, tmp_path: pathlib.Path) -> None:
    """Its options are explained, with no help from the search path or the working directory."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, _FOLDER / f"{script}.py", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--write" in done.stdout
