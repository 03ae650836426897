"""The README's bash and Python blocks run, and its tables are computed; test_docs.py tests docs/.

Console blocks are not run: they need ImageNet.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from repvgg_jax import VARIANTS, cost
from tests.helpers.flags import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

# Top-1 in %, as the authors publish it: paper, tables 4 and 5 (the better of two recipes), and
# their repository for D2se and plus-L2pse, which test at 320 pixels.
TOP1 = {
    "A0": "72.41", "A1": "74.46", "A2": "76.48", "B0": "75.14", "B1": "78.37", "B1g2": "77.78",
    "B1g4": "77.58", "B2": "78.78", "B2g4": "79.38", "B3": "80.52", "B3g4": "80.21",
    "D2se": "83.55 at 320", "plus-L2pse": "84.06 at 320",
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.strip()]


def variants_table() -> str:
    rows = ["| | blocks | params trained | params deployed | MACs | Winograd | top-1 % |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, variant in VARIANTS.items():
        c = cost(name)
        trained = f"{(c.params_train + c.params_auxiliary) / 1e6:.2f} M"
        deployed = f"{c.params_deploy / 1e6:.2f} M"
        depths = ", ".join(map(str, variant.depths))
        macs, winograd = (f"{n / 1e9:.2f} G" for n in (c.macs_deploy, c.winograd_muls))
        top1 = TOP1.get(name, "–")
        rows.append(
            f"| {name} | {depths} | {trained} | {deployed} | {macs} | {winograd} | {top1} |"
        )
    return "\n".join(rows)


def test_the_variants_table():
    assert variants_table() in README


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of what a user checks out, where nothing has run yet."""
    cwd = tmp_path_factory.mktemp("checkout") / "repvgg_jax"
    ignored = shutil.ignore_patterns(".*", "runs", "deploy", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, cwd, ignore=ignored)
    return cwd


def shell(command: str, cwd: pathlib.Path, timeout: int = 900) -> str:
    """Runs a command of the README with this environment's python."""
    bin_ = pathlib.Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": xla_flags(),
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_is_tested():
    """By a test below, or by .ci/run; add a test for a new one."""
    assert set(commands()) == {
        "make demo",
        "make test",
        "python train.py --config configs/digits.py",
        "python convert.py --workdir runs/digits --output deploy",
        "python convert.py --from a0.safetensors --output a0 --format safetensors,torch-official",
        "python train.py --workdir runs/tuned --init_from runs/digits --config.train.epochs 3",
        "python train.py --eval_only --init_from runs/tuned",
        "python convert.py --workdir runs/digits --output deploy-graph --format stablehlo",
        "pip install -r requirements.txt",
        "pip install -r requirements.txt -r requirements-dev.txt",
        "pip install -r requirements.txt -r requirements-cuda.txt",
        "pip install -r requirements.txt -r requirements-tpu.txt",
    }


def demo(place: pathlib.Path) -> list[str]:
    """The lines that `make demo` prints; what it writes is in `place` afterwards.

    Where .ci/run has run it in this checkout, the digits are not trained a second time.
    """
    if printed := os.environ.get("DEMO_OUTPUT"):
        for name in ("runs", "deploy"):
            shutil.copytree(ROOT / name, place / name)
        out = pathlib.Path(printed).read_text()
    else:
        out = shell("python train.py --config configs/digits.py", place)
        out += shell("python convert.py --workdir runs/digits --output deploy", place)
    return [" ".join(line.split()) for line in out.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_scripts_then_the_python_blocks(place):
    """In the order of the README."""
    lines = demo(place)
    (share,) = re.findall(r"^validation accuracy: ([\d.]+)% as trained", "\n".join(lines), re.M)
    assert float(share) >= 98.5
    told = next(block for block in blocks("text") if "as trained" in block).splitlines()
    told = [" ".join(line.split()) for line in told]
    begin = lines.index(told[0])
    assert lines[begin : begin + 3] == told[:3]
    for line in told[-3:-1]:
        assert line in lines
    program = "\n".join(blocks("python"))
    (place / "readme.py").write_text(program)
    out = shell("python readme.py", place)
    assert "'0', '1'" in out
    assert "A0 False timm" in out
    for command in commands():
        if "a0.safetensors" in command or "deploy-graph" in command:
            assert "written to" in shell(command, place)
        elif "--eval_only" in command:
            assert "of runs/tuned: 360 images" in shell(command, place)
        elif "runs/tuned" in command:
            assert "digits, training form, 10 classes" in shell(command, place)


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        (
            "demo",
            [
                "pip install -q -r requirements.txt",
                "python train.py --config configs/digits.py",
                "python convert.py --workdir runs/digits --output deploy",
            ],
        ),
        (
            "test",
            [
                "pip install -q -r requirements.txt",
                "pip install -q -r requirements-dev.txt",
                "python -m pytest",
            ],
        ),
    ],
)
def test_make_runs_the_same_commands(place, target, lines):
    """`make demo` and `make test` themselves are run by .ci/run."""
    planned = shell(f"make --dry-run {target}", place)
    assert "-m venv .venv" in planned
    found = [
        line.replace(".venv/bin/python -m pip", "pip").replace(".venv/bin/", "")
        for line in planned.splitlines()
        if line.startswith(".venv/bin/")
    ]
    assert found == lines
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert any(re.match(rf"make {target}\b", line) for line in ci)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("pip") and "cuda" in c])
def test_requirements_resolve(place, command):
    """Those that .ci/run does not install."""
    shell(command.replace("install", "install --dry-run --quiet"), place)


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_python_that_is_too_old_is_refused(place):
    """With a stand-in that runs the Makefile's check as Python 3.9.1 would."""
    stand_in = place / "old-python"
    disguise = "import sys; sys.version_info, sys.version = (3, 9, 1), '3.9.1 (main)'"
    stand_in.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "{disguise}; exec(sys.argv[1])" "$2"\n'
    )
    stand_in.chmod(0o755)
    with pytest.raises(AssertionError) as caught:
        shell("make demo PYTHON=./old-python", place)
    assert re.search(r"Python 3\.11 to 3\.13.*3\.9\.1", str(caught.value))
    assert not (place / ".venv").exists()
