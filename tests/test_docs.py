"""The commands of docs/ do what the pages say; their Python is tested beside its room.

What runs on this machine runs, on data and a network small enough for a test. What needs others,
in launch.md and scaling.md, is read as train.py would read it there.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data.augment import gallery as picture
from tests.flags import xla_flags
from tests.helpers.commands import run
from tests.helpers.pictures import images, write_tars
from tests.helpers.processes import RECIPE

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RUN_HERE = ["augmentation.md", "data.md", "deploy.md"]
READ_HERE = {"launch.md": 6, "scaling.md": 1}  # and how many commands of train.py there are


def text(page: str) -> str:
    return (DOCS / page).read_text()


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", text(page), re.M | re.S)
    return "".join(blocks).splitlines()


def scripts(page: str) -> list[str]:
    """What follows `python`, wherever a page tells to run something of ours."""
    return re.findall(r"\bpython,? +(-m \S+|[\w/]+\.py)", text(page))


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


def test_no_command_is_forgotten():
    """Pages whose commands a test below runs or reads; others name benchmarks at most."""
    pages = sorted(page.name for page in DOCS.glob("*.md"))
    assert [page for page in pages if commands(page)] == sorted([*RUN_HERE, "scaling.md"])
    for page in pages:
        told = [script for script in scripts(page) if not script.startswith("benchmarks/")]
        if page in RUN_HERE:
            assert len(told) == len(commands(page))
        elif page in READ_HERE:
            assert told == ["train.py"] * READ_HERE[page]
        else:
            # How results.md got its table: test_digits.py trains with that command.
            assert told == (["train.py"] if page == "results.md" else [])


def test_benchmarks_that_pages_name_exist():
    named = {s for p in DOCS.glob("*.md") for s in scripts(p.name) if s.startswith("benchmarks/")}
    assert named
    assert [script for script in named if not (ROOT / script).is_file()] == []


@pytest.mark.slow
def test_every_command_of_data(tmp_path):
    """As a reader would type them, with a small network in the place of B1."""
    write_tars(tmp_path / "tars", images(train=16, val=8))
    small = "    config.train.batch_size, config.data.train_size = 8, 32\n    return"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "b1.py").write_text(RECIPE.replace("    return", small))
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    prepare, train, verify, smaller = (
        command.replace("/data/", f"{tmp_path}/") for command in commands("data.md")
    )
    out = shell(prepare, tmp_path)
    assert "train: 16 images of 3 classes" in out
    assert "the others take about" in out
    out = shell(train, tmp_path)
    assert f"records:{tmp_path}/imagenet, 16 images of 32x32x3" in out
    assert "step 4: validation accuracy" in out
    assert "every image can be decoded" in shell(verify, tmp_path)
    shell(smaller, tmp_path)
    manifest = json.loads((tmp_path / "imagenet256" / "manifest.json").read_text())
    assert (manifest["details"]["short_side"], manifest["details"]["quality"]) == (256, 90)


@pytest.mark.slow
def test_every_command_of_augmentation(tmp_path):
    (command,) = commands("augmentation.md")
    assert shell(command, tmp_path) == "wrote augment.png\n"
    sheet = np.asarray(Image.open(tmp_path / "augment.png"))
    size, gap, margin = picture.SIZE, 4, 140
    names = list(picture.ARGUMENTS)
    count = (len(sheet) - gap) // (size + gap)
    assert count == len(names) + 8  # flip, three policies, jitter, erasing, mixup, cutmix
    rows = [
        [
            sheet[top : top + size, left : left + size].astype(int)
            for left in range(margin, margin + 8 * (size + gap), size + gap)
        ]
        for top in range(gap, gap + count * (size + gap), size + gap)
    ]
    for number, row in enumerate(rows):
        changed = [np.abs(one - same).mean() for one, same in zip(row, rows[0], strict=True)]
        assert (max(changed) > 1) == (number > 0), number  # the first is the identity
        for shown in row:
            assert shown.std() > 5  # there is something to see


def test_a_place_that_is_none_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "repvgg_jax.data.augment", "--output=none/augment.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: --output=none/augment.png: there is no directory none\n"


READER = """
import json, sys
from absl import flags
from ml_collections import config_flags
from repvgg_jax.train import command
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.validate import check_batches

found = []
for arguments, devices, processes in json.load(sys.stdin):
    sys.argv = ["train.py", *arguments]
    values = flags.FlagValues()  # each starts anew
    config_flags.DEFINE_config_file("config", flag_values=values)
    for flag in flags.FLAGS.get_flags_for_module(command):
        if flag.name != "config":
            values[flag.name] = flag
    rest = values(sys.argv)
    assert rest == ["train.py"], rest
    settings = Settings.from_config(values.config)
    check_batches(settings, devices=devices, processes=processes)
    found.append([settings.train.batch_size, settings.bn.group_size])
print(json.dumps(found))
"""


def sections(page: str) -> list[str]:
    return re.split(r"^## ", text(page), flags=re.M)


def calls(section: str) -> list[list[str]]:
    """The arguments of every train.py in a section, in a shell's words or in a list of YAML."""
    plain = re.findall(r'\bpython train\.py ([^"`]*?)(?=["`]|\n(?!--)|\Z)', section)
    listed = re.findall(r"\[python, train\.py, ([^\]]*)\]", section)
    return [shlex.split(call) for call in plain] + [re.split(r",\s+", call) for call in listed]


def test_every_command_of_launching_and_scaling():
    """Flags are known, the recipe loads, and the batch is the one that the page promises."""
    slice_of_256, asked, promised = (256, 64), [], []
    for page, count in READ_HERE.items():
        found = 0
        for section in sections(page):
            told = re.search(
                r"process \d+: \d+ of (\d+) devices, (\d+) processes; global batch (\d+) "
                r".* over (\d+)",
                section,
            )
            devices, processes = (int(told[1]), int(told[2])) if told else slice_of_256
            for arguments in calls(section):
                found += 1
                asked.append([arguments, devices, processes])
                promised.append([int(told[3]), int(told[4])] if told else [8192, 32])
        assert found == count
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(asked),
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == promised


@pytest.mark.slow
def test_every_command_of_deploying(digits_run, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    shutil.copytree(digits_run / "runs", tmp_path / "runs")
    for command in commands("deploy.md"):
        python, script, *arguments = command.split()
        assert (python, script) == ("python", "convert.py")
        status, out, _ = run(script, *arguments, cwd=tmp_path)
        assert status == 0, out
        assert "UNPROVEN" not in out
        output = tmp_path / arguments[arguments.index("--output") + 1]
        artefacts = json.loads((output / "proof.json").read_text())["artefacts"]
        assert [artefact["status"] for artefact in artefacts] == ["proven"] * len(artefacts)
