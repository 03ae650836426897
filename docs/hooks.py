"""What MkDocs does not do by itself: pages that are outside docs/, and the notebooks.

README, changelog and contributing guide are pages of the site and stay where forges look for them.
Links are written for the repository; here they become links between pages of the site.
"""

import pathlib
import posixpath
import re
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
