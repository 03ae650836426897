"""The wheel, installed into an environment of its own with exactly what its metadata asks for.

The environment's libraries are links to those that the tests run with. They are found as pip finds
them, from the requirements of the wheel, so that a missing requirement is a missing library.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

from repvgg_jax import __version__
from repvgg_jax import text as messages

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.system

# Libraries of train.py and convert.py that jax and Flax do not bring.
NOT_IN_THE_CORE = (
    "PIL", "chex", "cv2", "grain", "matplotlib", "ml_collections", "simplejpeg", "sklearn",
    "tensorboardX", "tensorflow_datasets",
)  # fmt: skip

LIBRARY = textwrap.dedent(
    f"""
    import importlib.util, pathlib, sys
    import jax, jax.numpy as jnp, numpy as np
    import repvgg_jax as rv

    assert pathlib.Path(rv.__file__).is_relative_to(sys.prefix), rv.__file__
    found = [name for name in {NOT_IN_THE_CORE!r} if importlib.util.find_spec(name)]
    assert not found, found

    variant = rv.Variant("tiny", depths=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_channels=8)
    model = rv.create_model(variant, num_classes=3)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
    variables = {{**variables, **new}}

    rv.save_weights("tiny.safetensors", variables, variant=variant)
    loaded = rv.load_weights("tiny.safetensors", variant=variant).variables
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), variables)

    expected = model.apply(variables, images)
    deployed = rv.create_model(variant, num_classes=3, deploy=True)
    logits = deployed.apply(rv.fuse_params(loaded), images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))
    """
)

PHOTOGRAPHS = textwrap.dedent(
    """
    import json, pathlib, types
    from repvgg_jax.train.proof_images import validation_images
    from repvgg_jax.train.settings import Settings

    config = json.loads(pathlib.Path("runs/digits/config.json").read_text())
    config["data"]["source"] = "tfds:imagenet2012"
    run = types.SimpleNamespace(settings=Settings.from_mapping(config), eval_shape=(32, 32, 3))
    print(validation_images(run, 8)[1])
    """
)


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    path: pathlib.Path

    def run(self, program: str, *arguments: object, cwd: pathlib.Path):
        """Runs `python` or a console script; its exit status, standard output and error."""
        outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [self.path / "bin" / program, *map(str, arguments)],
            cwd=cwd,
            env=outside,
            text=True,
            capture_output=True,
            timeout=500,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, because building leaves files behind."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for path in (*ROOT.glob("requirements*.txt"), *ROOT.glob("*.md"), *ROOT.glob("*.py")):
        shutil.copy(path, source)
    for name in ("LICENSE", "MANIFEST.in", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("repvgg_jax", "configs", "benchmarks", "examples", ".github", "docker"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    _pip("wheel", *options, "--wheel-dir", str(place), str(source))
    (found,) = place.glob("*.whl")
    return found


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _installed(wheel: pathlib.Path, path: pathlib.Path, *extras: str) -> Environment:
    """A new environment with the wheel and what it needs."""
    venv.create(path)
    python = path / "bin" / "python"
    _pip("--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (site,) = path.glob("lib/python*/site-packages")
    (package,) = importlib.metadata.distributions(name="repvgg-jax", path=[str(site)])
    for name in _closure(package, extras):
        for file in importlib.metadata.distribution(name).files or ():
            _link(file, site)
    return Environment(path)


def _closure(package: importlib.metadata.Distribution, extras: tuple[str, ...]) -> set[str]:
    """Names of the installed distributions that a package asks for, directly or indirectly."""
    pending = [(package, extra) for extra in ("", *extras)]
    seen = set(pending)
    names = set()
    while pending:
        distribution, extra = pending.pop()
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            try:
                needed = importlib.metadata.distribution(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                continue  # a runtime of an export format that these tests run without
            if distribution is package:
                assert needed.version in requirement.specifier, requirement
            names.add(needed.name)
            for wanted in ("", *requirement.extras):
                if (needed.name, wanted) not in seen:
                    seen.add((needed.name, wanted))
                    pending.append((needed, wanted))
    return names


def _link(file: importlib.metadata.PackagePath, site: pathlib.Path) -> None:
    """Links the outermost directory of a file that belongs to its distribution alone."""
    if ".." in file.parts:
        return  # a console script
    origin = pathlib.Path(str(file.locate())).parents[len(file.parts) - 1]
    for depth in range(1, len(file.parts) + 1):
        part = pathlib.Path(*file.parts[:depth])
        if (site / part).is_symlink():
            return
        if depth == len(file.parts) or (origin / part / "__init__.py").exists():
            (site / part).symlink_to(origin / part)
            return
        (site / part).mkdir(exist_ok=True)  # a namespace, which distributions share


def _lines(*names: str) -> set[str]:
    """The requirements in these files."""
    text = "\n".join((ROOT / name).read_text() for name in names)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return {line for line in lines if line}


def test_what_the_wheel_asks_for(wheel):
    """Four libraries; the lists of requirements cannot drift apart, for none repeats another."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        (scripts,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        text, entries = archive.read(metadata).decode(), archive.read(scripts).decode()
    assert "repvgg_jax/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"repvgg_jax"}
    assert re.findall(r"^(\S+) = ", entries, re.MULTILINE) == [
        "repvgg-convert", "repvgg-predict", "repvgg-prepare", "repvgg-train", "repvgg-visualize",
    ]  # fmt: skip
    message = importlib.metadata.PathDistribution(
        zipfile.Path(wheel, metadata.rpartition("/")[0] + "/")
    ).metadata
    assert message["Version"] == __version__
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)", text, re.M)]
    core = {r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert core == {"jax", "flax", "numpy", "safetensors"}
    offered = set(message.get_all("Provides-Extra"))
    assert {
        "train",
        "export",
        "hub",
        "tf",
        "cuda",
        "tpu",
        "dev",
        "onnx",
        "torch",
        "docs",
    } == offered

    parts = ("requirements-core.txt", "requirements-convert.txt", "requirements-train.txt")
    assert _lines("requirements.txt") == {f"-r {part}" for part in parts}
    everything = [Requirement(line).name.lower() for part in parts for line in _lines(part)]
    assert len(everything) == len(set(everything))
    train = {r.name for r in required if r.marker and r.marker.evaluate({"extra": "train"})}
    assert {name.lower() for name in core | train} == set(everything)


def test_recipes_are_in_the_wheel(wheel):
    """All of them, and nothing else of the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/configs/" in name]
    recipes = {f"repvgg_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert set(names) == recipes


def test_the_source_archive(wheel):
    """What is needed to test and to build, without measured results."""
    source = wheel.parent / "source"
    program = "from setuptools import build_meta; print(build_meta.build_sdist('archives'))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (source / "archives").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "setup.py",
        "requirements-core.txt",
        "configs/b1.py",
        "train.py",
        "benchmarks/fuse.py",
    }
    assert wanted <= names
    assert {"repvgg_jax/train/gpus.toml", "docker/cuda.Dockerfile"} <= names
    assert {".github/workflows/tests.yml", "examples/detector.py"} <= names
    assert (source / "benchmarks" / "results").is_dir()
    assert not [name for name in names if "results/" in name]


def test_the_version_is_written_once():
    text = "\n".join(
        (ROOT / name).read_text() for name in ("pyproject.toml", "setup.py", "CITATION.cff")
    )
    assert __version__ not in text
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_that_a_message_names_exists(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sources = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".py")]
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        offered = set(re.findall(r"^Provides-Extra: (.*)", archive.read(metadata).decode(), re.M))
    named = {name for source in sources for name in re.findall(r"repvgg-jax\[(\w+)\]", source)}
    named |= {name for source in sources for name in re.findall(r"""extra=["'](\w+)["']""", source)}
    assert {"hub", "torch", "tpu", "onnx", "tf"} <= named <= offered


@pytest.mark.parametrize("extra", ["export", "hub", "onnx", "tf", "torch", "tpu", "train"])
def test_what_a_message_says_to_install_exists(extra, monkeypatch, tmp_path):
    """The list of requirements in a checkout, the extra elsewhere."""
    command = messages.how_to_install(extra=extra)
    assert command.startswith("pip install -r requirements")
    assert (ROOT / command.removeprefix("pip install -r ")).is_file()
    monkeypatch.setattr(messages, "__file__", str(tmp_path / "lib" / "repvgg_jax" / "text.py"))
    assert messages.how_to_install(extra=extra).startswith(f'pip install ".[{extra}]"')


@pytest.mark.slow
def test_the_library_alone(wheel, tmp_path):
    """Models, fuse and weights; the commands name the extra that they need."""
    environment = _installed(wheel, tmp_path / "environment")
    status, out, err = environment.run("python", "-W", "error", "-c", LIBRARY, cwd=tmp_path)
    assert (status, out, err) == (0, "", "")
    for program, extra, arguments in (
        ("repvgg-train", "train", ["--help"]),
        ("repvgg-convert", "export", ["--from=tiny.safetensors", "--output=deploy"]),
    ):
        status, out, err = environment.run(program, *arguments, cwd=tmp_path)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"[{extra}]" in err


@pytest.mark.slow
def test_the_commands(wheel, tmp_path):
    """Training with [train] alone, then converting with [export] alone, as the scripts do."""
    training = _installed(wheel, tmp_path / "training", "train")
    for program, flag in (("repvgg-train", "--eval_only"), ("repvgg-prepare", "--short_side")):
        status, out, _ = training.run(program, "--help", cwd=tmp_path)
        assert status == 0
        assert re.search(rf"^  {flag}\b", out.replace("[no]", ""), re.MULTILINE)
        assert f"  {program} --" in out  # an example
        assert "python" not in out
    recipe = "--config=digits"  # there is no checkout
    short = ["--config.train.epochs=1", "--config.optimizer.warmup_epochs=0"]
    status, out, err = training.run("repvgg-train", recipe, *short, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert (tmp_path / "runs" / "digits" / "metrics.jsonl").exists()

    converting = _installed(wheel, tmp_path / "converting", "export")
    formats = "--format=orbax,safetensors,stablehlo"
    run, output = "--workdir=runs/digits", "--output=deploy"
    status, out, err = converting.run("repvgg-convert", run, output, formats, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "written to deploy" in out
    assert {"orbax", "model.safetensors", "model.stablehlo", "proof.json"} <= {
        path.name for path in (tmp_path / "deploy").iterdir()
    }
    # A run whose data need a library of [train] is proven on photographs.
    status, out, err = converting.run("python", "-c", PHOTOGRAPHS, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "photographs" in out
    assert "tensorflow_datasets" in out


def test_commits_are_checked_as_make_lint_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy|lint).*)", (ROOT / "Makefile").read_text(), re.M)
    checks = {line.removesuffix(" .").replace(" --check", "") for line in lint}
    assert {hook["entry"].removeprefix(".venv/bin/") for hook in hooks} == checks


def test_the_citation_names_software_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"].startswith("repvgg_jax")
    assert [reference["doi"] for reference in citation["references"]] == [
        "10.1109/CVPR46437.2021.01352"
    ]


@pytest.mark.slow
def test_ci_runs_what_the_test_command_skips(tmp_path):
    """With the second environment played by a variable."""
    missing = "os.environ.get('EVERYTHING') is None"
    (tmp_path / "test_library.py").write_text(
        "import os, pytest\n"
        f"if {missing}:\n    pytest.importorskip('no_such_library')\n"
        "def test_a(): pass\n"
    )
    (tmp_path / "test_part.py").write_text(
        "import os, pytest\n"
        f"@pytest.mark.skipif({missing}, reason='missing')\ndef test_b(): pass\n"
        "def test_c(): pass\n"
    )
    (tmp_path / "test_plain.py").write_text(
        "import pytest\ndef test_d(): pass\n@pytest.mark.slow\ndef test_e(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\naddopts = -m 'not slow'\n")

    def passed(*options: str, **variables: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-n", "2", "-v", "-p", "tests.helpers.passed"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *options],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted(re.findall(r"PASSED \S+::(\w+)", done.stdout))

    assert passed("--passed-to=passed") == ["test_c", "test_d"]
    assert (tmp_path / "passed").read_text() == "test_part.py::test_c\ntest_plain.py::test_d\n"
    again = passed("--not-in=passed", "-m", "slow or not slow", EVERYTHING="1")
    assert again == ["test_a", "test_b", "test_e"]
