"""The pages of docs/: their commands, their Python, and running them as a reader would."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

from tests.helpers.flags import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def text(page: str) -> str:
    """What the page says."""
    return (DOCS / page).read_text()


def commands(page: str) -> list[str]:
    """Lines of its bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text(page), re.M | re.S)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def python(page: str) -> str:
    """All its Python, from top to bottom."""
    return "\n".join(blocks(page))


def blocks(page: str) -> list[str]:
    """Each Python block of a page alone."""
    return re.findall(r"^```python\n(.*?)^```", text(page), re.M | re.S)


def shell(command: str, cwd: pathlib.Path) -> str:
    """Runs a command with this environment's python and this checkout."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()},
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
