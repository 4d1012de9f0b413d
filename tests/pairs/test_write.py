from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from tests.conftest import draw

from litune.errors import ConfigError, OutputExistsError
from litune.pairs.pairs import read_pairs
from litune.pairs.write import check_table, reading, write_pairs, write_table


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("beside", [True, False])
def test_pairs_are_read_back(photos: Path, tmp_path: Path, suffix: str, beside: bool) -> None:
    before = read_pairs(photos).table
    (tmp_path / "elsewhere").mkdir()
    file = (photos / "images" if beside else tmp_path / "elsewhere") / f"kept{suffix}"
    write_pairs(file, before)
    after = read_pairs(file).table
    for name in ("captions", "langs", "split"):
        assert after[name].to_pylist() == before[name].to_pylist()
    assert [Path(p).resolve() for p in after["path"].to_pylist()] == [
        Path(p).resolve() for p in before["path"].to_pylist()
    ]
    assert after["key"].to_pylist() == before["key"].to_pylist()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_fields_are_read_back(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.png").touch()
    source = tmp_path / "t.csv"
    source.write_text('image,title,description,tags\na.png,one,"two, ""quoted""",\nb.png,,,three\n', encoding="utf-8")
    columns = ("title", "description", "tags")
    before = read_pairs(source, caption_columns=columns).table
    write_pairs(tmp_path / f"kept{suffix}", before)
    after = read_pairs(tmp_path / f"kept{suffix}", caption_columns=columns).table
    for name in ("key", "captions", "fields"):
        assert after[name].to_pylist() == before[name].to_pylist()


SUFFIXES = [".parquet", ".jsonl", ".csv"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("captions", [(), ("a.txt",), ("a.txt", "b.txt")])
def test_pictures_without_captions_are_read_back(tmp_path: Path, suffix: str, captions: tuple[str, ...]) -> None:
    """Of none, of some and of all pictures there are captions: a kept table has as many pairs as it was made of."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        draw("red", "bar").save(folder / name)
    for name in captions:
        (folder / name).write_text("a red bar")
    before = read_pairs(folder).table
    write_pairs(tmp_path / f"kept{suffix}", before)
    after = read_pairs(tmp_path / f"kept{suffix}")
    assert after.table["key"].to_pylist() == ["a.png", "b.png"]
    assert after.table["captions"].to_pylist() == before["captions"].to_pylist()
    assert not after.damaged


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_classes_are_read_back(class_tree: Path, tmp_path: Path, suffix: str) -> None:
    before = read_pairs(class_tree).table
    write_pairs(tmp_path / f"kept{suffix}", before)
    after = read_pairs(tmp_path / f"kept{suffix}").table
    for name in ("key", "label", "captions"):
        assert after[name].to_pylist() == before[name].to_pylist()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("missing", ["", "ein Hund"])
def test_languages_of_fields_are_read_back(tmp_path: Path, suffix: str, missing: str) -> None:
    """A caption keeps its language in each field, also where one field lacks a language that another has."""
    (tmp_path / "a.png").touch()
    rows = ["a.png,en,a dog,it runs,u/a,7", "a.png,de,ein Hund,er rennt,u/a,7"]
    text = "\n".join(["image,lang,title,description,url,width_cm", *rows])
    source = tmp_path / "t.csv"
    source.write_text(text.replace(missing, "") if missing else text, encoding="utf-8")
    columns = ("title", "description")
    before = read_pairs(source, caption_columns=columns, keep=("width_cm",)).table
    write_pairs(tmp_path / f"kept{suffix}", before)
    after = read_pairs(tmp_path / f"kept{suffix}", caption_columns=columns, keep=("width_cm",)).table

    def captions(table: pa.Table) -> set[tuple[str, ...]]:
        return {*zip(*(table[name][0].as_py() for name in ("fields", "langs", "captions")), strict=True)}

    assert captions(after) == captions(before)
    assert captions(after) >= {("description", "de", "er rennt"), ("title", "en", "a dog")}
    assert after["url"].to_pylist() == ["u/a"]
    assert after["width_cm"].to_pylist() == ["7"]


def test_how_a_table_of_fields_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,title,tags\na.png,one,two\n", encoding="utf-8")
    (tmp_path / "a.png").touch()
    assert reading(read_pairs(tmp_path, caption_columns=("title", "tags")).table).endswith(
        "--caption-column title tags"
    )
    assert reading(read_pairs(tmp_path).table) == ""


def test_outputs_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_table(tmp_path / "x.csv", "--out", overwrite=False)
    check_table(tmp_path / "x.csv", "--out", overwrite=True)
    with pytest.raises(ConfigError, match=r"ends with .parquet, .jsonl, .csv"):
        check_table(tmp_path / "x.txt", "--out", overwrite=True)
    write_table(tmp_path / "x.csv", pa.table({"a": ["1", 'x "y", z'], "b": [None, "2"]}))
    assert (tmp_path / "x.csv").read_text() == 'a,b\n1,\n"x ""y"", z",2\n'
