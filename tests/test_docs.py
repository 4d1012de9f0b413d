"""What README and docs say is held against the code: links, commands, Python, headings."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import litune
from litune.cli import COMMANDS, GROUPS, main, parse

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").glob("*.py"),
    ]
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, those in a notebook's comments as well."""
    text = re.sub(r"(?m)^# ?(?=```|litune )", "", text)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `litune …` in a page's code blocks, and of those between backticks that name a command."""
    text = page.read_text(encoding="utf-8")
    found = []
    for line in "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "litune" in words and (words[0] in ("litune", "torchrun") or words[:2] == ["python", "-m"]):
            found.append(words[words.index("litune") + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    for arguments in commands(page):
        parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_settings_in_running_text_exist(page: Path) -> None:
    """`litune X …` and `--setting` between backticks: the command, and a setting of some command."""
    options = set((ROOT / "tests" / "cli_options.txt").read_text().split()) | {"--help"}
    prose = re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`([^`\n]+)`", prose):
        if name := re.match(r"litune ([a-z]\w*)(?: ([a-z]\w*))?", code):
            command = " ".join(filter(None, name.groups())) if name[1] in GROUPS else name[1]
            assert command in [*COMMANDS, *GROUPS], f"{page.name}: {code}"
            for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]+", code):
                assert option in options, f"{page.name}: {code}"


def test_help_of_every_command_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    """`litune X --help` answers for every command that a page types, and exits with 0."""
    typed = {arguments[0] for page in PAGES for arguments in commands(page)}
    assert {"embed", "tune", "eval", "search", "classify", "export"} <= typed
    for name in sorted(typed):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: litune {name}" in capsys.readouterr().out


def messages(sources: Path) -> set[str]:
    """Every text in the sources, on one line, with … for what is filled in."""
    found = set()
    for file in sources.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return {" ".join(text.split()) for text in found}


def test_troubleshooting_quotes_messages_that_litune_gives() -> None:
    """The parts of each quoted message stand, in order, in one text of the sources."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    known = messages(ROOT / "src" / "litune")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
        assert any(re.search(pattern, text) for text in known), f"litune never says: {message}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_names_exist(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "litune":
                assert node.attr in litune.__all__, f"{page.name}: litune.{node.attr}"


def test_every_command_and_setting_has_its_place() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"\n## litune {name}\n" in reference


def test_generated_pages_and_figures_are_up_to_date() -> None:
    from scripts import draw_figures, write_docs

    assert write_docs.reference() == (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert write_docs.api() == (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert draw_figures.write(check=True) == 0


def test_python_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in set(litune.__all__) - {"LituneError", "__version__"}:
        assert f"\n### litune.{name}\n" in page


def test_figures_count_multiply_adds() -> None:
    """The figure's formula against the multiply–adds that torch counts in a real tower's forward pass."""
    import timm
    import torch
    from scripts.draw_figures import IMAGE_TOWERS, products
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch32_224", num_classes=0)
        pixels = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(pixels)
    embedding = 3 * 32 * 32 * 768 * 49
    assert products(*IMAGE_TOWERS["B/32"]) == pytest.approx((counter.get_total_flops() / 2 - embedding) / 1e9, rel=0.01)


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
