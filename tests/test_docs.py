"""What README and docs say is held against the code: links, commands, Python, headings."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import litune
from litune.cli import COMMANDS, parse

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "litune" in words and (words[0] in ("litune", "torchrun") or words[:2] == ["python", "-m"]):
                parse(words[words.index("litune") + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_names_exist(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "litune":
                assert node.attr in litune.__all__, f"{page.name}: litune.{node.attr}"


def test_every_command_and_setting_has_its_place() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"\n## litune {name}\n" in reference


def test_reference_is_up_to_date() -> None:
    from scripts.write_docs import reference

    assert reference() == (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = blocks(text, "bash")[:2]
    assert "litune quickstart" in first
    assert "pytest" in second
    assert text.index("## Try it") < text.index(first) < text.index("## Test it") < text.index(second)


def test_nothing_private_and_no_lock_files() -> None:
    tracked = [p for p in ROOT.rglob("*") if p.is_file() and not {".git", ".venv"} & set(p.relative_to(ROOT).parts)]
    assert not [p for p in tracked if p.name in ("poetry.lock", "uv.lock", "Pipfile.lock")]
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.+-]+", line), line
