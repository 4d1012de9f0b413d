from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, picture

from litune.errors import DataError
from litune.pairs.cells import is_missing, printed_list, texts_in
from litune.pairs.pairs import read_pairs, say_pairs

TWO = ["a dog, running", 'it\'s "red"']


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(picture(NAMES[0]))
    return tmp_path


def postgres(texts: list[str]) -> str:
    """An array as PostgreSQL's documentation of array output has it."""
    quoted = ['"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts]
    return "{" + ",".join(quoted) + "}"


@pytest.mark.parametrize(
    "write", [str, lambda texts: str(tuple(texts)), lambda texts: str(np.array(texts)), json.dumps, postgres]
)
def test_lists_as_programs_print_them(write: Any, folder: Path) -> None:
    assert printed_list(write(TWO)) == TWO
    rows = [["image", "caption"], ["0.png", write(TWO)], ["1.png", write(["one"])]]
    with open(folder / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert read_pairs(folder).table["captions"].to_pylist() == [TWO, ["one"]]


def test_lists_with_nothing_in_them() -> None:
    assert printed_list('{dog,NULL,"a cat"}') == ["dog", "a cat"]
    assert printed_list("['a', None, 'b']") == ["a", "b"]
    assert [printed_list(cell) for cell in ("[]", "{}", "()")] == [[], [], []]


@pytest.mark.parametrize("text", ["[red] bar", "(a dog)", '("a dog")', "[portrait of a man, standing]", "{a", "["])
def test_brackets_of_captions(text: str) -> None:
    assert printed_list(text) == text


def test_missing_values_as_programs_write_them(folder: Path) -> None:
    table = pd.DataFrame({"image": ["0.png", "1.png"], "caption": ["a dog", None]})
    for value in ("nan", "NaN", "<NA>", "None", "null", "N/A", "#N/A", "NaT", "-1.#IND", "", r"\N", "(null)"):
        table.to_csv(folder / "t.csv", index=False, na_rep=value)
        pairs = read_pairs(folder)
        assert pairs.table["captions"].to_pylist() == [["a dog"], []], value
        assert "1 images without a caption" in pairs.source


def test_what_is_missing() -> None:
    for cell in ("#VALUE!", "#REF!", "#DIV/0!", "#NAME?", "[NULL]", "<null>", float("nan"), None, " n/a "):
        assert is_missing(cell), cell
    for cell in ("nancy", "NA school", "no", 0, "a null"):
        assert not is_missing(cell), cell


FIXED = pa.list_(pa.string(), 2)
STRUCT = pa.struct([("text", pa.string()), ("tokens", pa.list_(pa.int32()))])


@pytest.mark.parametrize(
    ("kind", "values", "captions"),
    [
        (pa.string_view(), ["one", "two"], [["one"], ["two"]]),
        (pa.large_string(), ["one", "two"], [["one"], ["two"]]),
        (pa.binary(), [b"one", "zwölf".encode()], [["one"], ["zwölf"]]),
        (pa.dictionary(pa.int8(), pa.string()), ["one", "two"], [["one"], ["two"]]),
        (FIXED, [TWO, ["a", None]], [TWO, ["a"]]),
        (pa.large_list(pa.large_string()), [TWO, []], [TWO, []]),
        (pa.list_view(pa.string()), [TWO, None], [TWO, []]),
        (pa.list_(pa.string_view()), [TWO, ["a"]], [TWO, ["a"]]),
        (pa.list_(pa.list_(pa.string())), [[["a"], ["b", "c"]], [TWO]], [["a", "b", "c"], TWO]),
        (STRUCT, [{"text": "one", "tokens": [1]}, None], [["one"], []]),
        (pa.list_(STRUCT), [[{"text": t, "tokens": []} for t in TWO], []], [TWO, []]),
        (pa.struct([("blurb", pa.string()), ("n", pa.int8())]), [{"blurb": "x", "n": 1}, None], [["x"], []]),
        (pa.map_(pa.string(), pa.string()), [[("en", "one")], []], [["one"], []]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["paths", "pictures", "arrow"])
def test_every_arrow_type(
    kind: pa.DataType, values: list[Any], captions: list[list[str]], form: str, folder: Path
) -> None:
    images = pa.array(["0.png", "1.png"]) if form == "paths" else pa.array([picture(name) for name in NAMES[:2]])
    table = pa.table({"image": images, "caption": pa.array(values, kind)})
    if form == "arrow":
        with pa.OSFile(f"{folder}/t.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        pa.parquet.write_table(table, folder / "t.parquet")
    pairs = read_pairs(folder)
    assert pairs.table["captions"].to_pylist() == captions
    assert not pairs.damaged


def test_captions_by_language(folder: Path) -> None:
    rows = [{"image": "0.png", "caption": {"en": "a dog", "de": ["ein Hund", "Hund"]}}]
    (folder / "t.json").write_text(json.dumps(rows))
    pairs = read_pairs(folder)
    assert pairs.table["captions"].to_pylist() == [["a dog", "ein Hund", "Hund"]]
    assert pairs.table["langs"].to_pylist() == [["en", "de", "de"]]


def test_what_is_no_caption(folder: Path) -> None:
    assert texts_in({"a1": "x", "b1": "y"}) == [({"a1": "x", "b1": "y"}, "")]
    (folder / "t.json").write_text(json.dumps([{"image": "0.png", "caption": {"a1": "x", "b1": "y"}}]))
    with pytest.raises(DataError, match="expected a string"):
        read_pairs(folder)


def test_captions_line_by_line(tmp_path: Path) -> None:
    """A .txt beside a picture has a caption on each line."""
    (tmp_path / "a.png").write_bytes(picture(NAMES[0]))
    (tmp_path / "a.txt").write_bytes(b"a dog\r\n\r\nan animal\rbrown\n")
    assert read_pairs(tmp_path).table["captions"].to_pylist() == [["a dog", "an animal", "brown"]]


def test_equal_captions_everywhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.csv").write_text("image,caption\n0.png,photo\n1.png,photo\n")
    say_pairs(read_pairs(folder))
    assert "all captions are 'photo'" in capsys.readouterr().err
    (folder / "t.csv").write_text("image,caption\n0.png,photo\n1.png,other\n")
    say_pairs(read_pairs(folder))
    assert "all captions" not in capsys.readouterr().err


def test_classes_keep_their_names(tmp_path: Path) -> None:
    """A class may be called None."""
    for name in ("None", "NA"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(NAMES[0]))
    assert read_pairs(tmp_path).table["captions"].to_pylist() == [["na"], ["none"]]
