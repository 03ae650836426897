"""The commands of docs/ do what the pages say; their Python is tested beside its room."""

import json
import pathlib
import re

import pytest

from tests.test_cli import SHORT, run

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    return "".join(blocks).splitlines()


def test_only_deploying_has_commands():
    """Whatever another page tells people to type must be run by a test, too."""
    assert [page.name for page in sorted(DOCS.glob("*.md")) if commands(page.name)] == ["deploy.md"]


@pytest.mark.slow
def test_every_command_of_deploying(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    status, _, err = run("train.py", *SHORT, cwd=tmp_path)
    assert (status, err) == (0, "")
    for command in commands("deploy.md"):
        python, script, *arguments = command.split()
        assert (python, script) == ("python", "convert.py")
        status, out, _ = run(script, *arguments, cwd=tmp_path)
        assert status == 0, out
        assert "UNPROVEN" not in out
        output = tmp_path / arguments[arguments.index("--output") + 1]
        artefacts = json.loads((output / "proof.json").read_text())["artefacts"]
        assert [artefact["status"] for artefact in artefacts] == ["proven"] * len(artefacts)
