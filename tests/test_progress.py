"""How far a long computation has come, on a terminal and in a log."""

import logging
import os
import pty
import subprocess
import sys
import threading

import pytest

from repvgg_jax import progress
from tests.helpers.commands import ROOT

PROGRAM = """
import logging, sys
logging.getLogger("repvgg_jax").setLevel(sys.argv[1])
from repvgg_jax.progress import progress
with progress("reading", 3) as advance:
    for _ in range(3):
        advance(1, "a file")
"""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only if they are added."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_log(clock, caplog):
    """Every ten seconds, but not for the end, which the result shows."""
    caplog.set_level(logging.INFO, logger="repvgg_jax")
    with progress.progress("reading", 2000, "files") as advance:
        advance(1000)
        clock[0] += 11
        advance(0, "the next")
        advance(500)
        clock[0] += 11
        advance(500)
    assert caplog.messages == ["reading: 1,000 of 2,000 files, now the next"]


def test_nothing_unless_asked(clock, caplog, capfd):
    caplog.set_level(logging.WARNING, logger="repvgg_jax")
    with progress.progress("reading", 2) as advance:
        clock[0] += 11
        advance()
    assert (caplog.messages, capfd.readouterr()) == ([], ("", ""))


def on_a_terminal(level: str, **variables: str) -> str:
    """What a program shows on a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level],
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stdout) == (0, b"")
    text = b""
    try:
        while some := os.read(ours, 65536):
            text += some
    except OSError:  # how a terminal ends whose last writer is gone
        pass
    os.close(ours)
    return text.decode()


@pytest.mark.system
def test_a_bar_on_a_terminal():
    """In color, unless NO_COLOR asks for none; nothing for a quiet command."""
    shown = on_a_terminal("INFO")
    assert "reading" in shown
    assert "3/3" in shown
    assert "\x1b[38;5;" in shown or "\x1b[3" in shown
    plain = on_a_terminal("INFO", NO_COLOR="1")
    assert "3/3" in plain
    assert "[38;5;" not in plain
    assert "[3" not in plain.replace("[3A", "")
    assert on_a_terminal("WARNING") == ""


@pytest.mark.parametrize("every", [0.0, 60.0])
def test_what_takes_long_is_announced(every, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", every)
    caplog.set_level("INFO", progress.logger.name)
    written = threading.Event()
    monkeypatch.setattr(caplog.handler, "emit", lambda _: written.set())
    with progress.announced("compiling for %dx%d", 8, 16):
        assert written.wait(10) if every == 0 else not written.is_set()
    assert written.is_set() == (every == 0)
