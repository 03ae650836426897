"""The pages of docs/: their commands and Python run, and the flags and settings they name exist.

Commands that need other machines, in launch.md and scaling.md, are parsed as train.py would parse
them there. The Python of deploy.md is run by tests/test_export.py and tests/test_convert.py, and
that of the tutorials by tests/test_tutorials.py.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

import repvgg_jax
from repvgg_jax import ReparamBlock, reparam
from repvgg_jax.data.augment import __main__ as picture
from tests.helpers.commands import run
from tests.helpers.jit import unoptimized
from tests.helpers.pages import DOCS, ROOT, commands, python, shell, text
from tests.helpers.pictures import images, write_tars
from tests.helpers.processes import RECIPE

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
RUN_HERE = [
    "augmentation.md", "data.md", "deploy.md", "fine_tuning.md", "getting_started.md",
    "own_images.md", "own_masks.md", "runtimes.md",
]  # fmt: skip
READ_HERE = ["launch.md", "scaling.md"]
PYTHON_HERE = [
    "covariance.md", "family.md", "own_block.md", "quantization.md", "reparameterization.md",
    "segmentation.md",
]  # fmt: skip
PYTHON_ELSEWHERE = [
    "deploy.md", "fine_tuning.md", "getting_started.md", "own_images.md", "own_masks.md",
    "runtimes.md",
]  # fmt: skip
# Of trtexec, SLURM and absl.
FOREIGN_FLAGS = {"fp16", "gpu-bind", "help", "ntasks-per-node", "signal"}


def scripts(page: str) -> list[str]:
    """Scripts and modules of this repository that a page runs."""
    return re.findall(r"\bpython,? +(-m [\w.]+|[\w/]+\.py)", text(page))


def test_every_page_with_code_is_tested():
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert {page for page in pages if commands(page)} <= {*RUN_HERE, *READ_HERE}
    assert {page for page in pages if python(page)} == {*PYTHON_HERE, *PYTHON_ELSEWHERE}


@pytest.mark.parametrize(
    "page", [PYTHON_HERE[0], *(pytest.param(p, marks=pytest.mark.slow) for p in PYTHON_HERE[1:])]
)
def test_python_runs(page, tmp_path, monkeypatch):
    """Top to bottom, in one namespace; `config` is what a recipe has.

    It takes longer to compile than to run, so it is compiled without optimizations.
    """
    from repvgg_jax.train.config import default_config

    monkeypatch.chdir(tmp_path)
    with unoptimized():
        exec(compile(python(page), page, "exec"), {"__name__": page, "config": default_config()})


@pytest.mark.core
def test_every_option_of_terms_and_blocks_is_explained():
    """Their names and defaults, in the tables of the page."""
    tables = dict(
        re.findall(r"^\| (`[^|]*`) \|([^|]*)\| .*\|$", text("reparameterization.md"), re.M)
    )
    told = {
        name: value for names, value in tables.items() for name in re.findall(r"`([^`]+)`", names)
    }
    structure = {"name", "kernel_size", "train", "parent"}
    for term in (reparam.Conv, reparam.Norm, reparam.AvgPool, reparam.Scale, reparam.BlockSpec):
        for field in dataclasses.fields(term):
            if field.name not in structure or (term, field.name) == (reparam.Scale, "name"):
                assert f"{term.__name__}.{field.name}" in told
    for field in dataclasses.fields(ReparamBlock):
        assert field.name in {*told, *structure}
    for name, value in told.items():
        term, _, option = name.rpartition(".")
        if term and (found := value.strip("` ")) not in ("", "none"):
            (field,) = (f for f in dataclasses.fields(getattr(reparam, term)) if f.name == option)
            assert str(field.default) == found.strip('"'), name


@pytest.mark.core
def test_every_public_name_is_on_the_page_of_them():
    """In the first column of its tables, and nothing else is there."""
    listed = re.findall(r"^\|(.*?)\|", text("api.md"), re.M)
    names = {name for cell in listed for name in re.findall(r"`(\w+)`", cell)}
    linear = {"Linear"}  # in words, beside its terms
    assert names | linear == {*repvgg_jax.__all__, *reparam.__all__}


def test_rooms_exist():
    """Every file and directory of the architecture page, and every package on that page.

    So are the modules beside the packages, and those of `reparam`.
    """
    (tree,) = re.findall(r"^## Rooms\n\n```text\n(.*?)^```", text("architecture.md"), re.M | re.S)
    parents, found = {0: ROOT}, set()
    for line in tree.splitlines():
        names, _, _ = line.lstrip().partition("   ")
        indent = len(line) - len(line.lstrip())
        for name in re.findall(r"[\w/]+(?:\.py|/)", names):
            path = parents[indent] / name
            assert path.exists(), f"{path.relative_to(ROOT)} in architecture.md"
            found.add(path)
            parents[indent + 2] = path
    packages = {path.parent for path in (ROOT / "repvgg_jax").rglob("__init__.py")}
    modules = {
        path
        for folder in (ROOT / "repvgg_jax", ROOT / "repvgg_jax" / "reparam")
        for path in folder.glob("[!_]*.py")
    }
    assert packages | modules <= found


def test_scripts_exist():
    named = {script for page in DOCS.glob("*.md") for script in scripts(page.name)}
    assert named
    for script in named:
        module = script.removeprefix("-m ").replace(".", "/")
        paths = [f"{module}/__main__.py", f"{module}.py"] if "-m " in script else [script]
        assert any((ROOT / path).is_file() for path in paths), script


@pytest.mark.core
def test_every_command_is_listed():
    """Console scripts, and modules that are run, in the table of runs.md."""
    table = re.findall(r"^\| `python ([^`]+)` \| (?:`(.+)`|the same) \|", text("runs.md"), re.M)
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {script for _, script in table if script} == set(installed)
    modules = {
        f"-m {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')}"
        for path in (ROOT / "repvgg_jax").rglob("*.py")
        if re.search(r"^    cli\.run\(main", path.read_text(), re.M)
    } - {"-m repvgg_jax.train.command", "-m repvgg_jax.convert.command"}
    assert {command for command, _ in table} == {"train.py", "convert.py", *modules}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_settings_exist(page):
    """Those in code: `--init_from`, `config.data.workers`, `--config.train.epochs=3`."""
    from repvgg_jax.train.config import default_config

    sources = [*(ROOT / "repvgg_jax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    defined = {"config"}
    for source in (*sources, ROOT / "train.py", ROOT / "convert.py"):
        defined |= set(
            re.findall(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?([\w-]+)"', source.read_text())
        )
    code = re.findall(r"^```(?:bash|console)\n(.*?)^```|`([^`\n]+)`", page.read_text(), re.M | re.S)
    config = default_config()
    for span in "\n".join("".join(groups) for groups in code).splitlines():
        ours = span.startswith("--") or re.match(r"python (train|convert|-m repvgg_jax)", span)
        for flag in re.findall(r"(?<!\S)--([\w-]+)", span) if ours else ():
            assert flag in defined | FOREIGN_FLAGS, f"--{flag} in {page.name}"
        for setting in re.findall(r"\bconfig\.([a-z]\w*(?:\.\w+)*)", span):
            if setting in ("json", "py"):
                continue
            node = config
            for name in setting.split("."):
                assert name in node, f"config.{setting} in {page.name}"
                node = node[name]


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
    assert re.search(rf"data=records:{tmp_path}/imagenet image=32x32x3 .*\b16\b", out)
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


@pytest.mark.system
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


@pytest.mark.system
def test_every_command_of_launching_and_scaling():
    """Flags are known, the recipe loads, and the batch is the one that the page promises."""
    slice_of_256, asked, promised = (256, 64), [], []
    for page in READ_HERE:
        found = 0
        for section in sections(page):
            told = re.search(
                r"\d+ of (\d+) devices, (\d+) processes; global batch (\d+) .* over (\d+)",
                section,
            )
            devices, processes = (int(told[1]), int(told[2])) if told else slice_of_256
            promise = [int(told[3]), int(told[4])] if told else [8192, 32]
            if one := re.search(r"devices=(\d+)x.* batch=(\d+) .* bn_group=(\d+)", section):
                (devices, *promise), processes = map(int, one.groups()), 1
            for arguments in calls(section):
                found += 1
                asked.append([arguments, devices, processes])
                promised.append(promise)
        assert found == scripts(page).count("train.py")
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
        artifacts = json.loads((output / "proof.json").read_text())["artefacts"]
        assert [artifact["status"] for artifact in artifacts] == ["proven"] * len(artifacts)
