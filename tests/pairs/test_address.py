from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest

from litune.errors import DataError, MissingExtraError
from litune.pairs.address import (
    expand,
    files_under,
    folder_of,
    folders_in,
    is_file,
    is_pattern,
    is_url,
    local,
    open_file,
    read_part,
)


def test_braces() -> None:
    assert expand("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert expand("{b,a}-{0..1}.tar") == ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar"]
    assert expand("s3://b/{0..1}.tar") == ["s3://b/0.tar", "s3://b/1.tar"]
    for many in ("{0..99999999}.tar", "{0..99999}/{0..99999}.tar"):
        with pytest.raises(DataError, match="more than 1,000,000 files"):
            expand(many)


def test_stars(tmp_path: Path) -> None:
    for name in ("2.tar", "1.tar", "3.txt"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/1.tar", f"{tmp_path}/2.tar"]
    with pytest.raises(DataError, match="no file is named like"):
        expand(f"{tmp_path}/*.zip")
    assert is_pattern("a*")
    assert not is_pattern("a.tar")


def test_elsewhere() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/litune-places/a/1.tar", b"0123456789")
    memory.pipe("/litune-places/b/.2.txt", b"")
    assert expand("memory://litune-places/*/*.tar") == ["memory:///litune-places/a/1.tar"]
    assert files_under("memory://litune-places/") == [
        "memory://litune-places/a/1.tar",
        "memory://litune-places/b/.2.txt",
    ]
    assert folders_in("memory://litune-places") == ["memory://litune-places/a", "memory://litune-places/b"]
    assert folder_of("memory://litune-places/a/1.tar") == "memory://litune-places/a"
    assert is_file("memory://litune-places/a/1.tar")
    assert not is_file("memory://litune-places/a")
    assert read_part("memory://litune-places/a/1.tar", 3, 4) == b"3456"
    with open_file("memory://litune-places/a/1.tar") as file:
        assert file.read() == b"0123456789"
    memory.rm("/litune-places", recursive=True)


def test_addresses() -> None:
    assert is_url("hf://datasets/x")
    assert not is_url("C:/x")
    assert local("file:///a/b") == "/a/b"
    with pytest.raises(DataError, match="a URL that fsspec knows"):
        is_file("nonsense://x")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match=r"s3://b/x.tar needs the package 's3fs'.*litune\[s3\]"):
        is_file("s3://b/x.tar")


def test_a_service_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each service raises errors of its own kinds; they become one kind, of one line."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no credentials\nmore lines")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", fail)
    with pytest.raises(OSError, match=r"^memory://a.tar can't be read: no credentials$"):
        read_part("memory://a.tar", 0, 5)
