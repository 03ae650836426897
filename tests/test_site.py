"""The documentation site, its notebooks, and the programs in examples/."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from flax.traverse_util import flatten_dict

import repvgg_jax
from repvgg_jax import reparam
from tests.helpers.flags import xla_flags
from tests.helpers.pages import DOCS, ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "digits")
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
OUTSIDE = {"index.md", "changelog.md", "contributing.md"}  # docs/hooks.py says where they are


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without importing what it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def nav(entries: list) -> list[str]:
    """The pages of a navigation, in order."""
    found = []
    for entry in entries:
        (target,) = entry.values()
        found += [target] if isinstance(target, str) else nav(target)
    return found


def test_every_page_is_in_the_navigation():
    pages = nav(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])
    assert len(pages) == len(set(pages))
    ours = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(pages) == ours | OUTSIDE | {f"notebooks/{name}.md" for name in NOTEBOOKS}


def test_lists_have_an_empty_line_before_them():
    """Forges do without it, the site does not."""
    for page in (*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CHANGELOG.md"))):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False):
            if re.match(r"([-*]|1\.) ", line):
                apart = not before.strip() or re.match(r"([-*]|\d+\.) |  ", before)
                assert apart, f"{page.name}: {line}"


class _Links(HTMLParser):
    """Targets of links and pictures, and names that links can lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if name := found.get("id"):
            self.names.add(name)
        if tag in ("a", "img") and (target := found.get("href") or found.get("src")):
            self.targets.append(target)


@pytest.mark.slow
def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path):
    """Without a warning; every public name is on a page of the reference."""
    for package in ("mkdocs", "material", "mkdocstrings", "nbconvert"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} of requirements-docs.txt is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {}
    for path in (tmp_path / "site").rglob("*.html"):
        pages[path] = _Links()
        pages[path].feed(path.read_text())
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are absolute
        for target in page.targets:
            place, _, name = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            to = (path.parent / place).resolve() if place else path
            to = to / "index.html" if to.is_dir() else to
            assert to.exists(), f"{path}: {target}"
            assert not name or to not in pages or name in pages[to].names, f"{path}: {target}"
    from repvgg_jax.train.config import default_config

    settings = (tmp_path / "site" / "reference" / "settings" / "index.html").read_text()
    assert set(re.findall(r"<td><code>config\.([\w.]+)</code></td>", settings)) == set(
        flatten_dict(default_config().to_dict(), sep=".")
    )
    for module, file in ((repvgg_jax, "repvgg_jax"), (reparam, "reparam")):
        names = pages[tmp_path / "site" / "reference" / file / "index.html"].names
        for name in set(module.__all__) - {"__version__"}:
            # A function of the same name as its module is there under its full name.
            places = {f"{module.__name__}.{name}", f"{module.__name__}.{name}.{name}"}
            assert places & names, f"{module.__name__}.{name} is not in the reference"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, tmp_path):
    """Each asserts what it shows."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": xla_flags(1),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they compile longer than they run
        },
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert len(done.stdout.splitlines()) >= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks(name, tmp_path, monkeypatch):
    """They run from top to bottom; what is committed has pictures and is small."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    path = pathlib.Path(ROOT, "notebooks", f"{name}.ipynb")
    assert path.stat().st_size < 500_000
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, f"{name} is committed without its outputs"
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3
    assert not [out for out in outputs if out.output_type == "stream" and out.name == "stderr"]
