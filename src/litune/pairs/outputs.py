"""What litune itself wrote, which may lie among somebody's pictures: it is no class, and no table of captions."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress
from pathlib import Path

from litune.errors import DataError
from litune.files import read_json

MARKS = (
    {"store.json"},
    {"img_emb"},
    {"manifest.json", "model.safetensors"},
    {"litune.json"},
    {"results.json", "report.md"},
    {"results.json", "table.md"},
    {"results.json", "gallery.html"},
    {"report.json", "report.html"},
    {"overview.json", "overview.html"},
)
"""The files that tell a store, a run, an export, a report, a comparison, the quickstart, duplicates and an overview."""
DROPPED = {"key", "caption", "rule"}
"""The columns of what a filter dropped."""


def is_marked(names: Set[str]) -> bool:
    """Whether files of these names lie together in what litune wrote alone."""
    return any(mark <= names for mark in MARKS)


def is_output(folder: Path, out: Path | None = None) -> bool:
    """Whether litune wrote a folder, or all folders in it, where it has nothing else; or is to write it, as `out`."""
    if out is not None and folder.resolve() == out.resolve():
        return True
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if is_marked({entry.name for entry in entries}) or _is_begun_run(folder):
        return True
    return bool(entries) and all(entry.is_dir() and is_output(entry) for entry in entries)


def _is_begun_run(folder: Path) -> bool:
    """Whether a run was begun in a folder: other tools write a config.json, too."""
    if (folder / "config.json").is_file():
        with suppress(DataError, OSError):
            return {"store", "text_tower"} <= read_json(folder / "config.json", DataError).keys()
    return False
