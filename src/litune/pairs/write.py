"""Writes pairs as a table that `read_pairs` reads back."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from litune.errors import ConfigError
from litune.files import atomic, check_file
from litune.pairs.reference import absolute

TABLES = (".parquet", ".jsonl", ".csv")
SLICE = 20_000


def check_table(file: Path, option: str, overwrite: bool) -> None:
    """Raise unless a table may be written to `file`."""
    if file.suffix.lower() not in TABLES:
        raise ConfigError(f"{option} {file}: give a name that ends with {', '.join(TABLES)}")
    check_file(file, option, overwrite)


def write_table(file: Path, rows: pa.Table) -> None:
    """Write a table as its suffix says, slice by slice; lists are JSON in .csv."""
    with atomic(file) as temporary:
        if file.suffix.lower() == ".parquet":
            with pa.parquet.ParquetWriter(temporary, rows.schema) as writer:
                for start in range(0, rows.num_rows, SLICE):
                    writer.write_table(rows.slice(start, SLICE))
            return
        with open(temporary, "w", encoding="utf-8", newline="") as out:
            if file.suffix.lower() == ".csv":
                table = csv.writer(out, lineterminator="\n")
                table.writerow(rows.column_names)
                table.writerows(row.values() for row in _rows(rows))
            else:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(rows))


def write_pairs(file: Path, pairs: pa.Table) -> None:
    """Write pairs (the columns of `Pairs.table`): one row per image, or per caption in .csv.

    Images inside the table's folder get relative paths, others absolute ones; `key` keeps the image's name. Each text
    field has its own column.
    """
    folder = file.parent.absolute()
    several = "fields" in pairs.column_names
    names = dict.fromkeys(pairs["fields"].combine_chunks().flatten().unique().to_pylist()) if several else ["caption"]
    schema = pa.schema(
        [
            ("image", pa.string()),
            ("key", pa.string()),
            *((name, pa.string()) for name in ("split", "label") if name in pairs.column_names),
            *([("lang", pa.string() if several else pa.list_(pa.string()))] if "langs" in pairs.column_names else []),
            *((name, pa.list_(pa.string())) for name in names),
        ]
    )

    def row(pair: dict[str, Any]) -> dict[str, Any]:
        cells: dict[str, Any] = {"image": absolute(pair["path"]).removeprefix(f"{folder}/")}
        cells |= {name: pair[name] for name in ("key", "split", "label") if name in pair}
        if several:
            cells |= {"lang": pair["langs"][0]} if pair.get("langs") else {}
            captions = list(zip(pair["fields"], pair["captions"], strict=True))
            return cells | {name: [text for field, text in captions if field == name] for name in names}
        return cells | ({"lang": pair["langs"]} if "langs" in pair else {}) | {"caption": pair["captions"]}

    with atomic(file) as temporary:
        kind = file.suffix.lower()
        if kind == ".parquet":
            with pa.parquet.ParquetWriter(temporary, schema) as writer:
                for start in range(0, pairs.num_rows, SLICE):
                    part = [row(pair) for pair in pairs.slice(start, SLICE).to_pylist()]
                    writer.write_table(pa.Table.from_pylist(part, schema))
            return
        with open(temporary, "w", encoding="utf-8", newline="") as out:
            if kind == ".jsonl":
                out.writelines(json.dumps(row(pair), ensure_ascii=False) + "\n" for pair in _rows(pairs))
                return
            table = csv.writer(out, lineterminator="\n")
            table.writerow(schema.names)
            for pair in _rows(pairs):
                table.writerows(_one_by_one(row(pair), schema))


def _one_by_one(row: dict[str, Any], schema: pa.Schema) -> Iterator[list[str]]:
    """A row of lists as rows of single values; values that are not lists are repeated."""
    lists = [row[name] for name in schema.names if isinstance(row.get(name), list)]
    for i in range(max(1, *map(len, lists))):
        values = (row.get(name) for name in schema.names)
        yield [(value[i] if i < len(value) else "") if isinstance(value, list) else value or "" for value in values]


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    slices = (table.slice(start, SLICE).to_pylist() for start in range(0, table.num_rows, SLICE))
    return itertools.chain.from_iterable(slices)
