from __future__ import annotations

import operator

import numpy as np
import pyarrow as pa
import pytest

from litune.errors import DataError
from litune.index.filters import FEW, Column, Condition, list_columns, select_rows

ROWS = [
    {"split": "val", "width": 640, "share": 0.5, "captions": ["a Red box"], "mine": True},
    {"split": "train", "width": 320, "share": 1.5, "captions": ["a dog", "the box is red"], "mine": False},
    {"split": None, "width": None, "share": None, "captions": None, "mine": None},
    {"split": "val=2", "width": 641, "share": -1.0, "captions": [], "mine": True},
]
TABLE = pa.Table.from_pylist(ROWS)
BY_NAME = {"=": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@pytest.mark.parametrize("op", BY_NAME)
@pytest.mark.parametrize("column", ["width", "share"])
@pytest.mark.parametrize("value", ["640", "0.5", "-1e0", "320"])
def test_numbers_against_python(column: str, op: str, value: str) -> None:
    expected = [row[column] is not None and BY_NAME[op](row[column], float(value)) for row in ROWS]  # type: ignore[call-overload]
    assert select_rows(TABLE, [f"{column}{op}{value}"]).tolist() == expected
    assert select_rows(TABLE, [f" {column} {op} {value} "]).tolist() == expected


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (["split=val"], [0]),
        (["split==val"], [0]),
        (["split=val=2"], [3]),
        (["split!=val"], [1, 3]),
        (["split>=val"], [0, 3]),
        (["split~AL"], [0, 3]),
        (["captions~red"], [0, 1]),
        (["captions~[rR]ed"], []),
        (["captions=a dog"], [1]),
        (["captions!=a dog"], [0, 3]),
        (["mine=true"], [0, 3]),
        (["mine!=yes"], [1]),
        (["captions~red", "width<640"], [1]),
        ([], [0, 1, 2, 3]),
    ],
)
def test_conditions(where: list[str], rows: list[int]) -> None:
    assert np.flatnonzero(select_rows(TABLE, where)).tolist() == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split", "can't be read: write COLUMN OPERATOR VALUE"),
        ("=val", "can't be read"),
        ("", "can't be read"),
        ("spilt=val", "perhaps you meant 'split'"),
        ("width=wide", "width holds numbers, 'wide' is none"),
        ("width~6", "~ is for text"),
        ("mine=perhaps", "mine is true or false"),
        ("mine<true", "mine is true or false"),
        ("split=\ud800", "no valid text"),
        ("__import__('os').system('x')=1", "names no column"),
    ],
)
def test_bad_conditions(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        select_rows(TABLE, [text])


def test_parsing_is_undone_by_str() -> None:
    for text in ("split=val", "width>=640", "captions~a, b"):
        assert str(Condition.parse(text)) == text


def test_columns_to_choose_from() -> None:
    assert list_columns(TABLE) == [
        Column("split", "text", ["train", "val", "val=2"]),
        Column("width", "number", None),
        Column("share", "number", None),
        Column("captions", "text", ["a Red box", "a dog", "the box is red"]),
        Column("mine", "truth", None),
    ]
    names = pa.array([f"{i:03}" for i in range(FEW + 1)])
    table = pa.table({
        "many": names,
        "langs": pa.array([["en"]] * FEW + [None]),
        "kind": names.take(pa.array([3] * (FEW + 1))).dictionary_encode(),
        "when": pa.array([0] * (FEW + 1), pa.timestamp("s")),
        "sha256": names,
    })  # fmt: skip
    assert list_columns(table) == [
        Column("many", "text", None), Column("langs", "text", ["en"]), Column("kind", "text", ["003"])
    ]  # fmt: skip
