"""Conditions on a store's metadata, such as `split=val` or `width>=640`; parsed, never evaluated as code."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.errors import DataError, nearest

_FORM = re.compile(r"\s*(?P<column>[^=!<>~]*?)\s*(?P<op>==|!=|<=|>=|=|<|>|~)\s*(?P<value>.*?)\s*", re.DOTALL)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "~": lambda values, part: pc.match_substring(values, part, ignore_case=True),
}
FEW = 100
"""Up to this many values of a column are listed to choose from."""
SAMPLED = 10_000
UNASKED = ("sha256", "image_path", "caption")
"""Columns that can be filtered by but are not offered: hashes, paths on disk, and the first of the captions."""
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Condition:
    """One condition: column, operator, value. `~` is a case-insensitive "contains"."""

    column: str
    op: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse `column op value`, with one of the operators = != < <= > >= ~. Raises `DataError`.

        >>> Condition.parse("width >= 640")
        Condition(column='width', op='>=', value='640')
        """
        match = _FORM.fullmatch(text)
        if match is None or not match["column"]:
            raise DataError(
                f"the filter {text!r} can't be read: write COLUMN OPERATOR VALUE, as in split=val or 'width>=640' "
                "(operators = != < <= > >= ~)"
            )
        return cls(match["column"], "=" if match["op"] == "==" else match["op"], match["value"])

    def __str__(self) -> str:
        return f"{self.column}{self.op}{self.value}"


@dataclass(frozen=True)
class Column:
    """A column that conditions can name: its kind, and its values where it is text with few distinct ones."""

    name: str
    kind: Literal["text", "number", "truth"]
    values: list[str] | None


def list_columns(table: pa.Table) -> list[Column]:
    """The columns that conditions can name, except those in `UNASKED`."""
    columns = []
    for name in table.column_names:
        kind = table.schema.field(name).type
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name in UNASKED:
            continue
        if pa.types.is_boolean(kind):
            columns.append(Column(name, "truth", None))
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            columns.append(Column(name, "number", None))
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns.append(Column(name, "text", _few_values(table[name])))
    return columns


def _few_values(column: pa.ChunkedArray) -> list[str] | None:
    """The distinct values of a text column, sorted; None where there are many, as the first rows mostly show."""
    for values in (column[:SAMPLED], column):
        flat = pc.list_flatten(values) if pa.types.is_nested(values.type) else values
        known = [value for value in flat.unique().to_pylist() if value is not None]
        if len(known) > FEW:
            return None
    return sorted(known)


def select_rows(table: pa.Table, where: Sequence[str]) -> np.ndarray:
    """Which of N rows meet all conditions, as a mask [N]. A missing value meets none.

    In a column of lists (captions, langs), one element has to meet the condition; with !=, no element may be equal.
    Raises `DataError` for an unknown column, or for a value or an operator that does not suit the column's type.
    """
    mask = np.ones(table.num_rows, dtype=bool)
    for text in [where] if isinstance(where, str) else where:
        mask &= _meets(table, Condition.parse(text))
    return mask


def _meets(table: pa.Table, condition: Condition) -> np.ndarray:
    if condition.column not in table.column_names:
        raise DataError(
            f"the filter {condition} names no column of the store: {nearest(condition.column, table.column_names)}"
        )
    column = table[condition.column].combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        present = column.is_valid().to_numpy(zero_copy_only=False)
        positive = Condition(condition.column, "=", condition.value) if condition.op == "!=" else condition
        flags = _compare(pc.list_flatten(column), positive)
        matches = np.zeros(len(column), dtype=bool)
        matches[pc.list_parent_indices(column).to_numpy(zero_copy_only=False)[flags]] = True
        return operator.and_(present, ~matches) if condition.op == "!=" else matches
    return _compare(column, condition)


def _compare(values: pa.Array, condition: Condition) -> np.ndarray:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    value = _as_type(condition, values.type)
    matches = _COMPARE[condition.op](values, value)
    return np.asarray(pc.fill_null(matches, False).to_numpy(zero_copy_only=False), dtype=bool)


def _as_type(condition: Condition, kind: pa.DataType) -> Any:
    """The condition's value as the column's type."""
    text = condition.value
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if condition.op == "~":
            raise DataError(f"the filter {condition}: ~ is for text, {condition.column} holds numbers; use = < <= > >=")
        try:
            return pa.scalar(float(text), pa.float64())
        except ValueError:
            raise DataError(f"the filter {condition}: {condition.column} holds numbers, {text!r} is none") from None
    if pa.types.is_boolean(kind):
        if text.lower() not in _TRUTH or condition.op not in ("=", "!="):
            raise DataError(f"the filter {condition}: {condition.column} is true or false, compared with = or !=")
        return pa.scalar(_TRUTH[text.lower()])
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            return text if condition.op == "~" else pa.scalar(text, kind)
        except (UnicodeEncodeError, pa.ArrowInvalid):
            raise DataError(f"the filter {condition!r}: its value is no valid text") from None
    raise DataError(f"the filter {condition}: {condition.column} is of type {kind}, which can't be compared")
