"""The docs site builds without a warning, and a built page asks nothing of other servers."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
from nbformat import v4
from scripts.site_hooks import notebook_page, on_page_markdown

ROOT = Path(__file__).parent.parent
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Loaded(HTMLParser):
    """What a browser fetches by itself for a page, and the ids that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag in FETCHED and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(values.get(FETCHED[tag], ""))
        if tag == "a":
            self.links.append(values.get("href", ""))
        self.ids.add(values.get("id", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Loaded]:
    found = {}
    for file in site.rglob("*.html"):
        found[file] = Loaded()
        found[file].feed(file.read_text(encoding="utf-8"))
    return found


def test_every_page_is_built(site: Path) -> None:
    names = {file.stem for file in (ROOT / "docs").glob("*.md")} - {"index"}
    assert names <= {file.stem for file in site.glob("*.html")}
    assert (site / "tutorial.html").exists()


def test_no_request_leaves_the_site(site: Path, pages: dict[Path, Loaded]) -> None:
    for file, page in pages.items():
        outside = [a for a in page.addresses if re.match(r"(https?:)?//", a)]
        assert not outside, f"{file.name} fetches {outside}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s)[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_links_in_the_built_pages_lead_somewhere(site: Path, pages: dict[Path, Loaded]) -> None:
    for file, page in pages.items():
        if file.name == "404.html":
            continue
        for link in page.links:
            if not link or re.match(r"[a-z]+:", link):
                continue
            path, anchor = urldefrag(unquote(link))
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{file.name} links to {link}"
            if anchor and target in pages and anchor != "__codelineno":
                assert anchor in pages[target].ids, f"{file.name} links to {link}"


def test_search_finds_every_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {urldefrag(entry["location"])[0] for entry in index["docs"]}
    assert {"photos.html", "method.html", "api.html", "tutorial.html", "benchmarks/index.html"} <= found


@pytest.mark.parametrize(
    ("page", "written", "built"),
    [
        ("method.md", "[a](design.md#layers)", "[a](design.md#layers)"),
        ("method.md", "[a](../benchmarks/README.md#x)", "[a](benchmarks/README.md#x)"),
        ("quickstart.md", "[a](../examples/from_tower_to_search.ipynb)", "[a](tutorial.md)"),
        ("CONTRIBUTING.md", "[a](docs/design.md)", "[a](design.md)"),
        ("benchmarks/designs/README.md", "[a](../../docs/results.md)", "[a](../../results.md)"),
        ("benchmarks/designs/README.md", "[a](heads.toml)", "[a](heads.toml)"),
        ("method.md", "[a](https://x.org/../y) [b](#c)", "[a](https://x.org/../y) [b](#c)"),
        ("method.md", "```python\nKINDS[kind](../spec)\n```", "```python\nKINDS[kind](../spec)\n```"),
    ],
)  # fmt: skip
def test_paths_in_the_repository_become_links_of_the_site(page: str, written: str, built: str) -> None:
    here: Any = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    nothing: Any = None
    assert on_page_markdown(written, here, nothing, nothing) == built


def test_a_notebook_becomes_a_page_with_its_pictures() -> None:
    picture = base64.b64encode(b"png").decode()
    outputs = [
        v4.new_output("stream", name="stdout", text="R@1 28%\n"),
        v4.new_output("display_data", data={"image/png": picture, "text/plain": "<Image>"}),
    ]
    book = v4.new_notebook(cells=[v4.new_markdown_cell("# Words"), v4.new_code_cell("print(1)", outputs=outputs)])
    page, pictures = notebook_page(book)
    assert page == (
        "# Words\n\n```python\nprint(1)\n```\n\n```text\nR@1 28%\n```\n\n![What the cell shows](tutorial-0.png)\n"
    )
    assert pictures == {"tutorial-0.png": b"png"}
