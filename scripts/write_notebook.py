"""Write examples/from_tower_to_search.ipynb from the script of the same name, and run it.

Run from the repository's root, after a change of the script; it takes some minutes. What cells print and the pictures
they show are kept in the notebook, for readers who don't run it; progress and times are left out. With --words nothing
is run and the outputs stay: for changes that leave the code as it was.
"""

from __future__ import annotations

import ast
import base64
import io
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "examples" / "from_tower_to_search.py"


def notebook() -> NotebookNode:
    """The script's cells as a notebook, with ids that depend on nothing but their place."""
    found: NotebookNode = jupytext.read(SCRIPT)
    for number, cell in enumerate(found.cells):
        cell.id = f"cell-{number}"
        cell.metadata = NotebookNode(tags=cell.metadata["tags"]) if "tags" in cell.metadata else NotebookNode()
    found.metadata = NotebookNode(
        kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"},
        language_info={"name": "python"},
    )
    return found


def run(book: NotebookNode, folder: Path, timeout: int = 1200) -> NotebookNode:
    """Run the notebook's cells in a folder; raises `CellExecutionError` where one fails."""
    return NotebookClient(book, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()


def tidy(book: NotebookNode) -> NotebookNode:
    """The notebook with what its cells print and show, and without progress and times."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.metadata.pop("execution", None)
            cell.outputs = [kept for output in cell.outputs if (kept := shown(output))]
    return book


def shown(output: NotebookNode) -> NotebookNode | None:
    """What is kept of an output: printed lines, and pictures in 64 colors, a third of the size."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if "image/png" in output.data:
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).quantize(64)
        file = io.BytesIO()
        picture.save(file, format="PNG", optimize=True)
        data = NotebookNode({"image/png": base64.b64encode(file.getvalue()).decode()})
        return NotebookNode(output_type="display_data", data=data, metadata=NotebookNode())
    return None


def with_outputs(book: NotebookNode, of: NotebookNode) -> NotebookNode:
    """The notebook with the outputs of another one of the same code."""
    code, known = ([cell for cell in one.cells if cell.cell_type == "code"] for one in (book, of))
    if [code_of(cell) for cell in code] != [code_of(cell) for cell in known]:
        sys.exit("the code has changed, not only words: run it, without --words")
    for cell, old in zip(code, known, strict=True):
        cell.outputs = old.outputs
    return book


def code_of(cell: NotebookNode) -> str:
    """A cell's code as Python sees it, without comments."""
    return ast.dump(ast.parse(cell.source))


if __name__ == "__main__":
    book, file = notebook(), SCRIPT.with_suffix(".ipynb")
    if "--words" in sys.argv[1:]:
        with_outputs(book, nbformat.read(file, as_version=4))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(book, Path(folder))
        tidy(book)
    nbformat.write(book, file)
