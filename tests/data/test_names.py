from __future__ import annotations

from pathlib import Path

import pytest

from litune.data.names import DEFAULT_TEMPLATES, canonicalize, read_templates
from litune.errors import ConfigError


def test_canonicalize() -> None:
    assert canonicalize("T-shirt") == "tshirt"
    assert canonicalize("Egyptian_Mau") == "egyptian mau"
    assert canonicalize("  a.b  c ") == "ab c"


def test_templates(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a photo of {}\n\nart of the {}.\n")
    assert read_templates([]) == DEFAULT_TEMPLATES
    assert read_templates([str(tmp_path / "t.txt"), "{}"]) == ("a photo of {}", "art of the {}.", "{}")
    with pytest.raises(ConfigError, match="exactly one"):
        read_templates(["a photo"])
