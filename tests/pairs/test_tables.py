from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, picture, write_shards

from litune.errors import DataError
from litune.pairs.pairs import read_pairs
from litune.pairs.reference import read_bytes

CAPTIONS = [["a red bar .", "one, two"], ["blue"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("1_a.jpg", "2_b.jpg"):
        (tmp_path / "images" / name).write_bytes(picture(NAMES[0], "JPEG"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Flickr8k.token.txt", "1_a.jpg#0\ta red bar .\n1_a.jpg#1\tone, two\n2_b.jpg#0\tblue\n"),
        ("results_20130124.token", "1_a.jpg#0\ta red bar .\n1_a.jpg#1\tone, two\n2_b.jpg#0\tblue\n"),
        ("captions.csv", 'image,caption\n1_a.jpg,a red bar .\n1_a.jpg,"one, two"\n2_b.jpg,blue\n'),
        ("results.csv", "image_name| n| comment\n1_a.jpg| 0| a red bar .\n1_a.jpg| 1| one, two\n2_b.jpg| 0| blue\n"),
        ("bare.csv", '1_a.jpg,a red bar .\n1_a.jpg,"one, two"\n2_b.jpg,blue\n'),
        ("bare.tsv", "1_a.jpg\ta red bar .\n1_a.jpg\tone, two\n2_b.jpg\tblue\n"),
        ("bars.csv", "1_a.jpg| 0| a red bar .\n1_a.jpg| 1| one, two\n2_b.jpg| 0| blue\n"),
        ("semicolons.csv", "filename;caption\n1_a.jpg;a red bar .\n1_a.jpg;one, two\n2_b.jpg;blue\n"),
        ("captions.txt", 'image,caption\n1_a.jpg,a red bar .\n1_a.jpg,"one, two"\n2_b.jpg,blue\n'),
        ("capitals.csv", 'Image,Caption\n1_a.jpg,a red bar .\n1_a.jpg,"one, two"\n2_b.jpg,blue\n'),
        ("quoted.tsv", '"image"\t"caption"\n1_a.jpg\t"a red bar ."\n1_a.jpg\tone, two\n"2_b.jpg"\tblue\n'),
        ("cells.csv", 'image,captions\n1_a.jpg,"[""a red bar ."", ""one, two""]"\n2_b.jpg,blue\n'),
        ("rows.json", '[{"image": "1_a.jpg", "caption": ["a red bar .", "one, two"]},'
         '{"image": "2_b.jpg", "caption": {"raw": "blue", "tokens": []}}]'),
        ("windows.csv", '\ufeffimage,caption\r\n1_a.jpg,a red bar .\r\n1_a.jpg,"one, two"\r\n2_b.jpg,blue\r\n'),
    ],
)  # fmt: skip
def test_lists_of_captions(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    for source in (folder, folder / name):
        pairs = read_pairs(source)
        assert pairs.table["key"].to_pylist() == ["1_a.jpg", "2_b.jpg"]
        assert pairs.table["captions"].to_pylist() == CAPTIONS
        assert not pairs.damaged


def test_quotes_between_tabs(folder: Path) -> None:
    """Quotes go where they are a spreadsheet's, and stay where a caption has them."""
    captions = ['"a ""red"" bar"', '"a "red" bar"', '5" tall', '"[1]"', '"']
    (folder / "t.tsv").write_text("image\tcaption\n" + "".join(f"1_a.jpg\t{caption}\n" for caption in captions))
    found = read_pairs(folder / "t.tsv").table["captions"][0].as_py()
    assert found == ['a "red" bar', '"a "red" bar"', '5" tall', "[1]", '"']


def test_what_is_no_list_of_captions(folder: Path) -> None:
    """Brackets in a caption are brackets."""
    captions = ['["a", 3]', '["torn"', "[red] bar", '["a" and "b"]']
    rows = [{"image": "1_a.jpg", "caption": caption} for caption in captions]
    (folder / "t.json").write_text(json.dumps(rows))
    assert read_pairs(folder / "t.json").table["captions"][0].as_py() == captions


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.json", b'[{"image": "1_a.jpg", "caption": "a"}', "t.json can't be read as JSON"),
        ("t.json", b"[]", "t.json has no list of images"),
        (
            "t.json",
            b'[{"image": "1_a.jpg", "caption": "a"}, 3]',
            "row 2 of t.json: it is a int, expected a JSON object",
        ),
    ],
)
def test_lists_that_are_none(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_pairs(folder / name)


def test_a_bar_that_is_missing(folder: Path) -> None:
    """Flickr30k's results.csv has a row without its second bar."""
    rows = [
        "image_name| comment_number| comment",
        *(f"1_a.jpg| {i}| caption {i}" for i in range(200)),
        "2_b.jpg| 4   A dog",
    ]
    (folder / "results.csv").write_text("\n".join(rows))
    pairs = read_pairs(folder)
    assert pairs.captions == 200
    assert [(d.key, d.reason) for d in pairs.damaged] == [
        ("row 201 of results.csv", "it has 2 cells, the table has 3 columns")
    ]


def test_damaged_rows_are_named(folder: Path) -> None:
    rows = [b"image,caption", *(b"1_a.jpg,caf\xc3\xa9 %d" % i for i in range(400))]
    rows[3] = b"1_a.jpg,Caf\xe9"
    rows[5] = b'1_a.jpg,"half" quoted'
    rows[7] = b"1_a\xff.jpg,x"
    rows[9] = b"1_a.jpg,a\0b"
    (folder / "t.csv").write_bytes(b"\n".join(rows))
    pairs = read_pairs(folder)
    assert [d.reason for d in pairs.damaged] == [
        "the caption is not UTF-8",
        "it can't be read: ',' expected after '\"'",
        "the image's name is not UTF-8",
    ]
    assert pairs.captions == 397
    assert "a b" in pairs.table["captions"][0].as_py()


def test_a_parquet_table_of_several_files(folder: Path) -> None:
    for i, name in enumerate(("1_a.jpg", "2_b.jpg")):
        pa.parquet.write_table(pa.table({"image": [name], "caption": [CAPTIONS[i]]}), folder / f"{i}.parquet")
    assert read_pairs(f"{folder}/*.parquet").table["captions"].to_pylist() == CAPTIONS


def test_keys_and_references_in_a_table(tmp_path: Path) -> None:
    """Pairs written as a table, with where each picture is in a tar, are read back by the names they had."""
    pairs = read_pairs(write_shards(tmp_path / "tars"))
    table = pairs.table.select(["key", "captions"]).append_column("image", pairs.table["path"])
    pa.parquet.write_table(table, tmp_path / "kept.parquet")
    again = read_pairs(tmp_path / "kept.parquet")
    for name in ("key", "path", "captions"):
        assert again.table[name].to_pylist() == pairs.table[name].to_pylist()
    assert read_bytes(again.table["path"][0].as_py()) == picture(NAMES[0])


def test_kept_columns(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption,url,license\n1_a.jpg,x,http://a,CC0\n2_b.jpg,y,,CC-BY\n")
    pairs = read_pairs(folder, keep=["license"])
    assert pairs.table["license"].to_pylist() == ["CC0", "CC-BY"]
    assert pairs.table["url"].to_pylist() == ["http://a", ""]
    with pytest.raises(DataError, match="no 'licence' to keep"):
        read_pairs(folder, keep=["licence"])


def test_what_is_no_table(folder: Path) -> None:
    for name, text, message in (
        ("notes.txt", "image,caption\n", "has no rows"),
        ("notes.txt", "hello\nworld\n", "not a table"),
        ("t.csv.gz", "\x1f\x8b", "compressed with gzip"),
    ):
        (folder / name).write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=message):
            read_pairs(folder / name)
