"""What a person at a terminal sees while a run goes on."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tests.helpers.flags import xla_flags
from tests.helpers.processes import RECIPE, ROOT, TIMEOUT

COLUMNS = 160
LIVE = re.compile(
    r"step (\d+)/48, ((?:\d+ h )?(?:\d+ min )?(?:\d+ s )?)left  loss (\d+\.\d{4})  "
    r"accuracy (\d+\.\d\d)%  ([\d,]+) images/s/device  data-wait (\d+)%"
)


def shown(command: list[str], **options) -> str:
    """Runs a command at a terminal of its own; all that it writes there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # how a terminal ends whose last writer is gone
        while some := os.read(ours, 65536):
            text += some
    os.close(ours)
    assert process.wait(TIMEOUT) == 0, text.decode()
    return text.decode()


@pytest.mark.slow
def test_the_live_line(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    # Test runners say in these how wide their own terminal is.
    unset = {"NO_COLOR", "COLUMNS", "LINES"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    text = shown(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--config=recipe.py",
            "--workdir=run",
            "--config.train.epochs=6",
            "--config.eval.every_epochs=6",
            "--config.checkpoint.every_epochs=6",
            "--config.report.every_steps=24",
        ],
        cwd=tmp_path,
        env=environment,
    )
    # Redrawn by a clock, and also at the first step and with each row of the report.
    lines = [match.groups() for match in LIVE.finditer(text)]
    steps = [int(step) for step, *_ in lines]
    assert steps == sorted(steps)
    assert set(steps) >= {1, 24, 48}
    for _, left, loss, accuracy, speed, wait in lines:
        assert left
        assert float(loss) > 0
        assert 0 <= float(accuracy) <= 100
        assert int(speed.replace(",", "")) > 0
        assert 0 <= int(wait) <= 100
    # The line is written over, and gone in the end.
    assert text.count("\x1b[2K") >= len(lines)
    assert "step" not in text.splitlines()[-1]
    assert "next: python convert.py" in text
