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

from tests.flags import xla_flags
from tests.processes import RECIPE, ROOT, TIMEOUT

COLUMNS = 160
LIVE = re.compile(
    r"step (\d+)/480, ((?:\d+ h )?(?:\d+ min )?(?:\d+ s )?)left  loss (\d+\.\d{4})  "
    r"accuracy (\d+\.\d\d)%  ([\d,]+) images/s a device  data-wait (\d+)%"
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
            "--config.train.epochs=60",
            "--config.eval.every_epochs=60",
            "--config.checkpoint.every_epochs=60",
            "--config.report.every_steps=480",
        ],
        cwd=tmp_path,
        env=environment,
    )
    # The line is written four times a second; the steps take some seconds.
    lines = [match.groups() for match in LIVE.finditer(text)]
    steps = [int(step) for step, *_ in lines]
    assert len(set(steps)) >= 2  # it goes on between two rows of the report
    assert steps == sorted(steps)
    assert steps[0] >= 1
    assert steps[-1] <= 480
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
