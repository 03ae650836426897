"""Workflows and container files, which run elsewhere: what can be checked without running them."""

import json
import pathlib
import re
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path):
    return [step for job in jobs(path).values() for step in job.get("steps", ())]


def commands(path):
    return [step["run"] for step in steps(path) if "run" in step]


def test_there_are_workflows_for_tests_docs_and_releases():
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]
    assert [path.stem for path in DOCKERFILES] == ["cuda", "tpu"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow(path):
    """Read-only by default, limited in time, with pinned actions, and only targets that exist."""
    content = yaml.safe_load(path.read_text())
    assert content.keys() >= {"name", True, "permissions", "jobs"}  # YAML reads `on` as true
    assert content["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for name, job in jobs(path).items():
        assert set(job.get("needs", "").split()) <= jobs(path).keys()
        if "uses" in job:  # another workflow of ours
            called = ROOT / job["uses"]
            assert "workflow_call" in yaml.safe_load(called.read_text())[True]
            continue
        assert job["timeout-minutes"] <= 120, name
        assert job["runs-on"] != "ubuntu-latest"
        for step in job["steps"]:
            assert len(step.keys() & {"run", "uses"}) == 1
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
    for command in commands(path):
        assert "${{" not in command  # what others can choose must not become a command
        for target in re.findall(r"^make (.+)$", command, re.M):
            assert set(target.split()) <= set(targets), target
        if command.startswith("."):
            assert (ROOT / command).stat().st_mode & 0o100


def test_every_supported_python_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {c.rpartition(" ")[2] for c in project["classifiers"] if ":: 3." in c}
    (tests,) = (path for path in WORKFLOWS if path.stem == "tests")
    assert set(jobs(tests)["test"]["strategy"]["matrix"]["python"]) == listed
    assert {"make lint", "make test", "make package", ".ci/run"} <= set(commands(tests))


def instructions(path):
    """(name, arguments) of every instruction, with lines continued."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_container_file(path):
    """The rules of hadolint that apply: pinned base, absolute places, no cache, not as root."""
    found = instructions(path)
    assert {name for name, _ in found} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    assert found[0][0] == "FROM"
    for name, arguments in found:
        if name == "FROM":  # DL3006, DL3007
            assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", arguments)
        if name == "WORKDIR":  # DL3000
            assert arguments.startswith("/")
        if name == "RUN":  # DL3042, DL3004, DL3008, DL4006, DL3003
            assert all("--no-cache-dir" in part for part in arguments.split("&&") if "pip" in part)
            assert not re.search(r"\bsudo\b|apt-get|\||\bcd ", arguments)
        if name == "CMD":  # DL3025
            assert json.loads(arguments)
    assert [name for name, _ in found].count("CMD") == 1  # DL4003
    users = [arguments for name, arguments in found if name == "USER"]
    assert users[-1:] not in ([], ["root"])  # DL3002


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_into_a_container_is_there(path):
    """And is not kept out by .dockerignore; it is all that the package is built from."""
    kept = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = set()
    for name, arguments in instructions(path):
        if name == "COPY":
            *sources, target = arguments.split()
            assert target in ("./", sources[-1])  # DL3020, DL3021
            copied |= set(sources)
    assert copied == kept
    assert all(list(ROOT.glob(source)) for source in copied)
    extras = re.search(r'"\.\[(.*)\]"', path.read_text())[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(extras) <= project["tool"]["setuptools"]["dynamic"]["optional-dependencies"].keys()
    assert path.stem in extras
