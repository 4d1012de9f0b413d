"""What MkDocs builds besides docs/: pages that live elsewhere in the repository, and the notebook as a page.

Links are written as paths in the repository, so that they work wherever its files are shown; here they become links of
the site.
"""

from __future__ import annotations

import base64
import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "from_tower_to_search.ipynb"
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(
        path.relative_to(ROOT).as_posix()
        for folder in ("designs", "evaluations")
        for path in sorted((ROOT / "benchmarks" / folder).iterdir())
        if path.is_file()
    ),
)
# Pages of the repository that the site has under another name.
INSTEAD = {"README.md": "index.md", "examples/from_tower_to_search.ipynb": "tutorial.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
CODE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    text, pictures = notebook_page(nbformat.read(NOTEBOOK, as_version=4))
    files.append(File.generated(config, "tutorial.md", content=text))
    for name, picture in pictures.items():
        files.append(File.generated(config, name, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the page's links, relative to its file in the repository, into links of the site."""
    here = page.file.src_uri
    in_repository = here if here in OUTSIDE else "docs/" + here

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), found[1]))
        target = INSTEAD.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    words_and_code = CODE.split(markdown)  # words at even places
    words_and_code[::2] = [LINK.sub(link, words) for words in words_and_code[::2]]
    return "".join(words_and_code)


def notebook_page(notebook: Any) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, with the pictures that its cells have shown."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"tutorial-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell shows]({name})")
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures
