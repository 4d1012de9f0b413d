from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import litune


def test_all_names_are_there_and_no_more() -> None:
    assert litune.__all__ == [
        "FeatureStore", "ImageTower", "ImageTransform", "Index", "LiT", "LituneError", "classify", "compare",
        "dedup_data", "embed", "eval", "export", "fetch_data", "filter_data", "fit", "import_", "inspect",
        "inspect_data", "load", "probe", "push", "quickstart", "search", "sigmoid_loss", "softmax_loss", "tune",
        "__version__",
    ]  # fmt: skip
    for name in litune.__all__:
        assert getattr(litune, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(litune.__file__).read_text(encoding="utf-8"))
    typed = {a.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names if a.asname}
    assert typed == set(litune.__all__) - {"__version__"}


def test_import_is_light() -> None:
    code = "import sys, litune; assert not {'torch', 'tyro', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
