"""Pages: what a template prints is escaped, and nothing is fetched from elsewhere."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import jinja2
import pytest
from PIL import Image

from litune.index.gallery import write_page as write_gallery
from litune.index.index import Found
from litune.pages import thumbnail, write_page

NAME = '<b>"it\'s" & more'


def test_gallery(tmp_path: Path) -> None:
    """Queries, keys and addresses are text; the picture that is right is marked."""
    matches = [
        Found(0, NAME, str(tmp_path / "first.png"), 0.51234),
        Found(1, "other", str(tmp_path / "other.png"), 0.25),
    ]
    write_gallery(tmp_path / "page.html", NAME, NAME, [(NAME, matches)], [{"other"}], NAME)
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page
    assert "it's" not in page
    assert page.count("&lt;b&gt;") == 6
    assert '<li class="right"><img src="other.png" alt="other, score 0.250, the right one"' in page
    assert not re.search(r"https?://|@import|url\(|<script", page)


@pytest.mark.parametrize("template", ["gallery.html", "overview.html", "duplicates.html", "report.html"])
def test_templates_are_in_the_package_and_name_what_they_lack(tmp_path: Path, template: str) -> None:
    assert resources.files("litune.pages").joinpath(template).is_file()
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        write_page(tmp_path / "page.html", template)
    assert not (tmp_path / "page.html").exists()


def test_thumbnail(tmp_path: Path) -> None:
    """A data: address of a small JPEG; empty for a picture that is gone or damaged."""
    Image.new("RGB", (400, 100), "red").save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert thumbnail(str(tmp_path / "a.png"), 40).startswith("data:image/jpeg;base64,")
    assert [thumbnail(path, 40) for path in ("", str(tmp_path / "gone.png"), str(tmp_path / "bad.png"))] == [""] * 3
