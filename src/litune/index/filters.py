"""Conditions on a store's metadata, as `split=val` or `width>=640`: read by hand, nothing is ever evaluated."""

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
"""So many values of a column can be listed to choose from."""
SAMPLED = 10_000
UNASKED = ("sha256", "image_path", "caption")
"""Columns that can be asked for, but not by hand: hashes, places on the disk, and the first of the captions."""
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Condition:
    """One condition: column, operator, value. `~` is "contains", whatever the case."""

    column: str
    op: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read `column op value`, the operator one of = != < <= > >= ~. Raises `DataError`.

        >>> Condition.parse("width >= 640")
        Condition(column='width', op='>=', value='640')
        """
        found = _FORM.fullmatch(text)
        if found is None or not found["column"]:
            raise DataError(
                f"the filter {text!r} can't be read: write COLUMN OPERATOR VALUE, as in split=val or 'width>=640' "
                "(operators = != < <= > >= ~)"
            )
        return cls(found["column"], "=" if found["op"] == "==" else found["op"], found["value"])

    def __str__(self) -> str:
        return f"{self.column}{self.op}{self.value}"


@dataclass(frozen=True)
class Column:
    """A column that conditions can ask for: its kind, and all its values where they are few texts."""

    name: str
    kind: Literal["text", "number", "truth"]
    values: list[str] | None


def list_columns(table: pa.Table) -> list[Column]:
    """The columns that conditions can ask for, but for those in `UNASKED`."""
    found = []
    for name in table.column_names:
        kind = table.schema.field(name).type
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name in UNASKED:
            continue
        if pa.types.is_boolean(kind):
            found.append(Column(name, "truth", None))
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            found.append(Column(name, "number", None))
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            found.append(Column(name, "text", _few_values(table[name])))
    return found


def _few_values(column: pa.ChunkedArray) -> list[str] | None:
    """All values of a column of texts, sorted; None where there are many, which the first rows mostly tell."""
    for values in (column[:SAMPLED], column):
        flat = pc.list_flatten(values) if pa.types.is_nested(values.type) else values
        known = [one for one in flat.unique().to_pylist() if one is not None]
        if len(known) > FEW:
            return None
    return sorted(known)


def select_rows(table: pa.Table, where: Sequence[str]) -> np.ndarray:
    """Which of N rows meet all conditions, as a mask [N]. A missing value meets none.

    Of a column of lists (captions, langs) one element has to meet the condition; with != no element may be equal.
    Raises `DataError` for an unknown column, or a value or an operator that does not suit its type.
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
        there = column.is_valid().to_numpy(zero_copy_only=False)
        positive = Condition(condition.column, "=", condition.value) if condition.op == "!=" else condition
        flags = _compare(pc.list_flatten(column), positive)
        found = np.zeros(len(column), dtype=bool)
        found[pc.list_parent_indices(column).to_numpy(zero_copy_only=False)[flags]] = True
        return operator.and_(there, ~found) if condition.op == "!=" else found
    return _compare(column, condition)


def _compare(values: pa.Array, condition: Condition) -> np.ndarray:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    value = _as_type(condition, values.type)
    found = _COMPARE[condition.op](values, value)
    return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False), dtype=bool)


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
