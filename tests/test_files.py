from __future__ import annotations

import os
from pathlib import Path

import pytest

from litune.errors import OutputExistsError, RunError
from litune.files import (
    atomic,
    check_file,
    clear_output,
    decode_text,
    encoding_of,
    holds_nothing,
    read_json,
    read_text,
    replace_folder,
    sweep_temporaries,
    write_json,
    write_text,
)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_texts_in_any_encoding(tmp_path: Path, encoding: str, newline: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Café\ngroße Straße\n" + ("– “quoted”\n" if encoding == "cp1252" else "犬\n")
    (tmp_path / "a.txt").write_bytes(text.replace("\n", newline).encode(encoding))
    assert read_text(tmp_path / "a.txt") == text
    assert ("a.txt is not UTF-8: it is read as Latin-1" in capsys.readouterr().err) == (encoding == "cp1252")


def test_what_is_no_text() -> None:
    """Damaged UTF-8, and bytes with control characters, are not taken for Latin-1."""
    for data in (
        b"\xff\xd8\xff\xe0\x10JFIF\x01",
        "größer, größer, größer".encode() + b"\xe9",
        "собака".encode("cp1251"),
    ):
        assert encoding_of(data) == "utf-8"
        with pytest.raises(UnicodeDecodeError):
            decode_text(data)
    assert encoding_of(b"\x81 caf\xe9") == "latin-1"
    assert decode_text(b"") == ""


def test_atomic_leaves_the_old_file_on_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(ValueError, match="stop"), atomic(file) as temporary:
        temporary.write_text("half of the n")
        raise ValueError("stop")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"name": "Zoë"})
    assert read_json(tmp_path / "a" / "b.json", RunError) == {"name": "Zoë"}
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RunError, match="expected a JSON object"):
        read_json(tmp_path / "list.json", RunError)


def test_clear_output(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    clear_output(folder, False, "feature store", overwrite=False)
    folder.mkdir()
    clear_output(folder, False, "feature store", overwrite=False)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not a feature store of litune"):
        clear_output(folder, False, "feature store", overwrite=True)
    assert (folder / "thesis.tex").exists()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        clear_output(folder, True, "feature store", overwrite=False)
    clear_output(folder, True, "feature store", overwrite=True)
    assert not folder.exists()
    folder.write_text("a file")
    with pytest.raises(OutputExistsError, match="is a file"):
        clear_output(folder, True, "feature store", overwrite=True)


def test_a_folder_whose_first_writer_was_killed_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".config.json.123.tmp").write_text("{")
    assert holds_nothing(tmp_path)
    clear_output(tmp_path, False, "run", False)
    (tmp_path / ".notes.tmp").write_text("mine")
    assert not holds_nothing(tmp_path)
    with pytest.raises(OutputExistsError, match="not empty and not a run of litune"):
        clear_output(tmp_path, False, "run", False)


def test_sweep(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "img_emb" / ".img_emb_0001.npy.123.tmp").write_text("half")
    (tmp_path / ".tmpE6Rsec").write_text("half of a safetensors file")
    (tmp_path / "keep").write_text("")
    sweep_temporaries(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["keep"]


def test_atomic_flushes_the_file_and_then_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[Path, bool]] = []

    def fsync(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (tmp_path / "a" / "b.txt").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a" / "b.txt", "text")
    (file, before), (folder, renamed) = flushed
    assert (file.parent, before) == (tmp_path / "a", False)
    assert (folder, renamed) == (tmp_path / "a", True)


def make_folder(folder: Path, word: str, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(word)
    return folder


def words(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.iterdir())]


def test_replace_folder_killed_anywhere_is_finished_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a", "manifest", "z")
    make_folder(tmp_path / "best", "old", *names)
    rename = Path.replace
    for moved in range(3):
        make_folder(tmp_path / "new", f"new {moved}", *names)
        left = [*range(moved)]

        def replace(file: Path, target: Path, left: list[int] = left) -> Path:
            if not left:
                raise SystemExit("killed")
            left.pop()
            return rename(file, target)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Path, "replace", replace)
            replace_folder(tmp_path / "new", tmp_path / "best", last="manifest")
        assert len(words(tmp_path / "best")) == 3
        assert (tmp_path / "new" / "manifest").exists()  # it goes last
        replace_folder(tmp_path / "new", tmp_path / "best", last="manifest")
        assert words(tmp_path / "best") == [f"new {moved}"] * 3
    make_folder(tmp_path / "new", "half", "a")  # killed while it was written
    replace_folder(tmp_path / "new", tmp_path / "best", last="manifest")
    assert words(tmp_path / "best") == ["new 2"] * 3
    make_folder(tmp_path / "new", "first", *names)
    replace_folder(tmp_path / "new", tmp_path / "another", last="manifest")
    assert words(tmp_path / "another") == ["first"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "best"]


def test_check_file(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    check_file(None, "--json", overwrite=False)
    check_file(file, "--json", overwrite=False)
    file.write_text("{}")
    check_file(file, "--json", overwrite=True)
    with pytest.raises(OutputExistsError, match="results.json exists: choose another --json, or give --overwrite"):
        check_file(file, "--json", overwrite=False)
    with pytest.raises(OutputExistsError, match="exists"):
        check_file(tmp_path, "--json", overwrite=True)
