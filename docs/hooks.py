"""What MkDocs does not do by itself: pages that are outside docs/, notebooks, tables of settings.

README, changelog and contributing guide are pages of the site and stay where forges look for them.
Links are written for the repository; here they become links between pages of the site.
"""

import ast
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File
from nbconvert.exporters import MarkdownExporter

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Places on the site by place in the repository.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "LICENSE.txt",
}

WIDE = ("models.md", "results.md")  # tables that need the room of the navigation


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are outside docs/."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        body, resources = MarkdownExporter().from_filename(str(notebook))
        pictures = resources["outputs"]
        for name, content in pictures.items():
            unique = f"{notebook.stem}_{name}"
            body = body.replace(f"]({name})", f"]({unique})")
            files.append(File.generated(config, f"notebooks/{unique}", content=content))
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=body))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links between files of the repository links between pages of the site."""
    uri = page.file.src_uri
    if uri in WIDE:
        page.meta["hide"] = ["navigation"]
    markdown = re.sub(r"^<!-- settings of (\S+) -->$", _settings, markdown, flags=re.MULTILINE)
    here = next((path for path, at in OUTSIDE.items() if at == uri), f"docs/{uri}")

    def link(match: re.Match) -> str:
        target, _, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if path.startswith("notebooks/"):
            place = path.replace(".ipynb", ".md")
        else:
            place = OUTSIDE.get(path, path.removeprefix("docs/"))
        place = posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return f"]({place}{'#' if anchor else ''}{anchor})"

    if uri.startswith("notebooks/"):
        here = uri
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", link, markdown)


def _settings(module: re.Match) -> str:
    """A table of every section in a module of settings."""
    tree = ast.parse((ROOT / module[1]).read_text())
    found = [_section(node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return "\n".join(filter(None, found))


def _section(section: ast.ClassDef) -> str:
    path = next((word.value.value for word in section.keywords if word.arg == "path"), "")
    rows = list(_rows(section, path))
    head = ["| setting | default | |", "|---|---|---|"]
    about = (ast.get_docstring(section) or "").partition("\n")[0]
    return "\n".join([f"\n## `{path}`\n\n{about}\n", *head, *rows, ""]) if path and rows else ""


def _rows(section: ast.ClassDef, path: str) -> Iterator[str]:
    for field in section.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.value, ast.Call):
            continue
        call = field.value
        if ast.unparse(call.func) != "setting":
            continue
        default, about = call.args
        words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        limits = [
            f"{words.get(word.arg, 'one of')} `{ast.unparse(word.value)}`"
            for word in call.keywords
            if word.arg in (*words, "choices")
        ]
        told = "; ".join([ast.literal_eval(about), *limits]).replace("|", "\\|")
        yield f"| `{path}.{field.target.id}` | `{ast.unparse(default)}` | {told} |"
