"""Write examples/from_tower_to_search.ipynb from the script of the same name, and run it.

Run from the repository's root, after a change of the script; it takes some minutes. What cells print and the pictures
they show are kept in the notebook, for readers who don't run it; progress and times are left out.
"""

from __future__ import annotations

import base64
import io
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


if __name__ == "__main__":
    book = notebook()
    with tempfile.TemporaryDirectory() as folder:
        run(book, Path(folder))
    nbformat.write(tidy(book), SCRIPT.with_suffix(".ipynb"))
