from __future__ import annotations

from pathlib import Path

import pytest

from litune.errors import ConfigError
from litune.prompts import DEFAULT_TEMPLATES, canonicalize, read_labels, read_templates, write_prompts


def test_canonicalize() -> None:
    assert canonicalize("T-shirt") == "tshirt"
    assert canonicalize("Egyptian_Mau") == "egyptian mau"
    assert canonicalize("  a.b  c ") == "ab c"


def test_labels_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("wombat\r\n\r\n Bär \r\n".encode("utf-16"))
    assert read_labels(["jaguar", str(tmp_path / "labels.txt")]) == ("jaguar", "wombat", "Bär")
    with pytest.raises(ConfigError, match=r"nowhere\.txt can't be read"):
        read_labels(["nowhere.txt"])
    (tmp_path / "labels.txt").write_bytes(b"\xff\xd8\x01")
    with pytest.raises(ConfigError, match="is no text"):
        read_labels([str(tmp_path / "labels.txt")])


def test_prompts() -> None:
    names, templates = ["T-Shirt", "Crane, bird", "???"], ["A photo of a {}.", "{}"]
    assert write_prompts(names, templates) == [
        "a photo of a tshirt", "tshirt", "a photo of a crane, bird", "crane, bird", "a photo of a ???", "???",
    ]  # fmt: skip
    assert write_prompts(names[:2], templates[:1], canonical=False) == [
        "A photo of a T-Shirt.",
        "A photo of a Crane, bird.",
    ]


def test_templates(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a photo of {}\n\nart of the {}.\n")
    assert read_templates([]) == DEFAULT_TEMPLATES
    assert read_templates([str(tmp_path / "t.txt"), "{}"]) == ("a photo of {}", "art of the {}.", "{}")
    with pytest.raises(ConfigError, match="exactly one"):
        read_templates(["a photo"])
