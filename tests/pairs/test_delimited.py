from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from tests.pairs.packed import NAMES, picture

from litune.errors import DataError
from litune.pairs.pairs import read_pairs

CAPTIONS = ["a boat\non the water", 'a "red" bar, or\ttwo', '5" tall', "plain"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(NAMES[0]))
    return tmp_path


def captions(folder: Path) -> list[str]:
    return [texts[0] for texts in read_pairs(folder).table["captions"].to_pylist()]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("columns", [["image", "caption"], ["caption", "image"], ["image", "caption", "split"]])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_tables_of_pandas(folder: Path, separator: str, columns: list[str], quoting: int) -> None:
    images = [f"{i}.png" for i in range(4)]
    table = pd.DataFrame({"image": images, "caption": CAPTIONS, "split": ["train"] * 4})[columns]
    file = folder / f"t.{'tsv' if separator == chr(9) else 'csv'}"
    for settings in ({}, {"lineterminator": "\r\n"}, {"doublequote": False, "escapechar": "\\"}):
        table.to_csv(file, sep=separator, index=False, quoting=quoting, **settings)  # type: ignore[arg-type]
        pairs = read_pairs(folder)
        assert [texts[0] for texts in pairs.table["captions"].to_pylist()] == CAPTIONS
        assert not pairs.damaged


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_quote_that_is_not_closed_costs_its_row_alone(folder: Path, suffix: str) -> None:
    separator = {"csv": ",", "tsv": "\t"}[suffix]
    cells = ["plain", '"half', "a dog", 'a cat"']
    lines = [f"image{separator}caption", *(f"{i}.png{separator}{cell}" for i, cell in enumerate(cells))]
    (folder / f"t.{suffix}").write_text("\n".join(lines))
    pairs = read_pairs(folder, max_damaged=0.5)
    read = dict(zip(pairs.table["key"].to_pylist(), pairs.table["captions"].to_pylist(), strict=True))
    assert (read["0.png"], read["2.png"], read["3.png"]) == (["plain"], ["a dog"], ['a cat"'])
    if suffix == "csv":
        assert [(d.key, d.reason) for d in pairs.damaged] == [
            ("row 2 of t.csv", "it can't be read: a quote is not closed")
        ]
    else:
        assert read["1.png"] == ['"half']


def test_blanks_before_quotes(folder: Path) -> None:
    (folder / "t.csv").write_text('image, caption\n0.png, "a dog, big"\n1.png, "a ""cat"""\n')
    assert captions(folder) == ["a dog, big", 'a "cat"']


def test_excels_first_line(folder: Path) -> None:
    (folder / "t.csv").write_text("sep=;\nimage;caption\n0.png;a dog\n")
    assert captions(folder) == ["a dog"]


@pytest.mark.parametrize(
    ("rows", "texts", "splits"),
    [
        (["0.png,a dog,train", "1.png,a cat,val"], ["a dog", "a cat"], ["train", "val"]),
        (["train,0.png,a dog", "validation,1.png,a cat"], ["a dog", "a cat"], ["train", "validation"]),
        (["a dog,0.png", "a cat,1.png"], ["a dog", "a cat"], None),
        (["0.png,17,a dog,en,test", "1.png,18,a cat,de,test"], ["a dog", "a cat"], ["test", "test"]),
        (["0.png,http://x/0.png,a dog", "1.png,http://x/1.png,a cat"], ["a dog", "a cat"], None),
        (["0.png,12345", "1.png,678"], ["12345", "678"], None),
    ],
)
def test_without_a_header(folder: Path, rows: list[str], texts: list[str], splits: list[str] | None) -> None:
    for suffix, separator in (("csv", ","), ("tsv", "\t"), ("csv", ";")):
        (folder / f"t.{suffix}").write_text("\n".join(rows).replace(",", separator))
        pairs = read_pairs(folder)
        assert [captions[0] for captions in pairs.table["captions"].to_pylist()] == texts
        assert (pairs.table["split"].to_pylist() if splits else None) == splits
        (folder / f"t.{suffix}").unlink()


def test_columns_that_can_not_be_told_apart(folder: Path) -> None:
    (folder / "t.csv").write_text("0.png,pets,a dog\n1.png,pets,a cat\n")
    with pytest.raises(DataError, match=r"no names of columns .* \(pets, a dog\): write the names above"):
        read_pairs(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "token"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_encoding(
    folder: Path, encoding: str, suffix: str, newline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = '{"image": "0.png", "caption": "Café, größer"}'
    text = {
        "csv": 'image,caption\n0.png,"Café, größer"\n',
        "tsv": "image\tcaption\n0.png\tCafé, größer\n",
        "jsonl": f"{row}\n",
        "json": f"[{row}]\n",
        "token": "0.png#0\tCafé, größer\n",
    }[suffix]
    (folder / f"t.{suffix}").write_bytes(text.replace("\n", newline).encode(encoding))
    assert captions(folder) == ["Café, größer"]
    assert ("is read as Latin-1" in capsys.readouterr().err) == (encoding in ("cp1252", "latin-1"))
