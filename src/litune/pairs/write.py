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
    field has its own column. `lang` has the captions' languages, or `lang_FIELD` those of each field where fields
    differ in them. Further columns stay as they are. An image without captions has an empty list, `[]` in .csv.
    """
    folder = file.parent.absolute()
    schema = _schema(pairs)

    def row(pair: dict[str, Any]) -> dict[str, Any]:
        languages = _by_field(pair, "langs")
        cells = pair | {"image": absolute(pair["path"]).removeprefix(f"{folder}/")}
        cells |= {"lang": next(iter(languages.values()), [])}
        cells |= {f"lang_{field}": values for field, values in languages.items()}
        cells |= _by_field(pair, "captions")
        return {column.name: cells.get(column.name, [] if pa.types.is_list(column.type) else None) for column in schema}

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
                out.writelines(json.dumps(row(pair), ensure_ascii=False, default=str) + "\n" for pair in _rows(pairs))
                return
            table = csv.writer(out, lineterminator="\n")
            table.writerow(schema.names)
            for pair in _rows(pairs):
                table.writerows(_one_by_one(row(pair)))


def reading(pairs: pa.Table) -> str:
    """How a table of these pairs is to be read, for the end of a line; empty where nothing has to be given."""
    fields = _fields(pairs)
    return f"; read it with --caption-column {' '.join(fields)}" if len(fields) > 1 else ""


def _fields(pairs: pa.Table) -> list[str]:
    """The columns of captions in a table of these pairs."""
    several = "fields" in pairs.column_names
    return (pairs["fields"].combine_chunks().flatten().unique().to_pylist() if several else []) or ["caption"]


def _schema(pairs: pa.Table) -> pa.Schema:
    """The columns of a table of these pairs: image, key, metadata, languages, captions."""
    fields = _fields(pairs)
    languages: list[str] = []
    if "langs" in pairs.column_names:
        alike = all(len(set(map(tuple, _by_field(pair, "langs").values()))) <= 1 for pair in _rows(pairs))
        languages = ["lang"] if alike else [f"lang_{field}" for field in fields]
    lists = [*languages, *fields]
    own = {"path", "captions", "langs", "fields", "image", "key", *lists}
    columns = [pa.field(name, pa.string()) for name in ("image", "key")]
    columns += [column for column in pairs.schema if column.name not in own and not pa.types.is_nested(column.type)]
    return pa.schema([*columns, *(pa.field(name, pa.list_(pa.string())) for name in lists)])


def _by_field(pair: dict[str, Any], column: str) -> dict[str, list[str]]:
    """The captions, or languages, of one image by text field; all are of "caption" where there are no fields."""
    if not (values := pair.get(column)):
        return {}
    by_field: dict[str, list[str]] = {}
    for field, value in zip(pair.get("fields") or ["caption"] * len(values), values, strict=True):
        by_field.setdefault(field, []).append(value)
    return by_field


def _one_by_one(row: dict[str, Any]) -> Iterator[list[Any]]:
    """A row of lists as rows of single values, the last one `[]` if all lists are empty; other values are repeated."""
    longest = max(len(value) for value in row.values() if isinstance(value, list))
    if not longest:
        yield [*("" if isinstance(value, list) else value for value in list(row.values())[:-1]), "[]"]
    for i in range(longest):
        yield [(value[i] if i < len(value) else "") if isinstance(value, list) else value for value in row.values()]


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    slices = (table.slice(start, SLICE).to_pylist() for start in range(0, table.num_rows, SLICE))
    return itertools.chain.from_iterable(slices)
