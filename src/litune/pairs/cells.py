"""What the cells of tables hold: captions, lists of them as programs print them, nothing at all."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from contextlib import suppress
from typing import Any

from litune.pairs.sample import CAPTION_COLUMNS

MISSING = frozenset(
    {
        *("", "na", "<na>", "#na", "n/a", "#n/a", "#n/a n/a", "nan", "-nan", "+nan", "nat", "none", "null", "nil"),
        *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "1.#snan"),
        # Excel's errors
        *("#value!", "#ref!", "#div/0!", "#name?", "#null!", "#num!", "#nv", "#getting_data", "#spill!", "#calc!"),
        *("#field!", "#blocked!", "#unknown!", "#connect!", "#busy!", "#error!"),
        # SQL's consoles and dumps
        *(r"\n", "(null)", "<null>", "[null]", "{null}", "(none)", "<none>", "undefined"),
    }
)
"""How programs write a missing value, in lower case."""
_STRING = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_NONE = r"(?:None|null|nan|NaN|<NA>)"
_PYTHON = re.compile(
    rf"\[\s*(?:{_STRING}|{_NONE})(?:(?:\s*,\s*|\s+)(?:{_STRING}|{_NONE}))*\s*,?\s*\]"
    rf"|\(\s*{_STRING}\s*,(?:\s*{_STRING}\s*(?:,|(?=\))))*\s*\)",
    re.DOTALL,
)
_POSTGRES = re.compile(r'\{(?:"(?:[^"\\]|\\.)*"|[^",{}\\]+)(?:,(?:"(?:[^"\\]|\\.)*"|[^",{}\\]+))*\}', re.DOTALL)
_ELEMENT = re.compile(r'"((?:[^"\\]|\\.)*)"|([^",{}\\]+)', re.DOTALL)
_LANGUAGE = re.compile(r"[a-z]{2}(?:[-_][A-Za-z]{2,4})?")


def is_missing(cell: Any) -> bool:
    r"""Whether a cell says that there is nothing: None, NaN, or how programs write it.

    >>> [is_missing(cell) for cell in (None, float("nan"), " NaN", "#N/A", "\\N", "a nan")]
    [True, True, True, True, True, False]
    """
    if isinstance(cell, str):
        return len(cell) < 20 and cell.strip().lower() in MISSING
    return cell is None or cell != cell


def printed_list(cell: str) -> Any:
    r"""The texts in a list that Python, NumPy, JSON or Postgres has printed; a cell that is none as it is.

    >>> printed_list("['a dog', \"it's\"]"), printed_list('{"a dog",cat}'), printed_list("[red] bar")
    (['a dog', "it's"], ['a dog', 'cat'], '[red] bar')
    """
    if cell.strip() in ("[]", "{}", "()"):
        return []
    if cell[:1] not in "[({" or cell[-1:] not in "])}":
        return cell
    with suppress(ValueError, RecursionError):
        parsed = json.loads(cell)
        texts = isinstance(parsed, list) and all(isinstance(text, (str, dict, type(None))) for text in parsed)
        return parsed if texts or isinstance(parsed, dict) else cell
    with suppress(ValueError, SyntaxError):
        if _PYTHON.fullmatch(cell):
            return [literal_eval(text) for text in re.findall(_STRING, cell, re.DOTALL)]
    if _POSTGRES.fullmatch(cell):
        pairs = _ELEMENT.findall(cell)
        return [re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL) or plain for quoted, plain in pairs if plain != "NULL"]
    return cell


def texts_in(cell: Any) -> list[tuple[Any, str]]:
    """The captions in a cell, each with its language where the cell says that, else "".

    A cell is a caption, a list of them, a struct with one in it ({"raw": "a dog", "tokens": …}), or a struct of
    captions by language. What is none of these is returned as it is, for the check of captions to name.
    """
    if isinstance(cell, list) and cell and all(isinstance(part, tuple) for part in cell):
        cell = dict(cell)  # what Arrow makes of a map
    if isinstance(cell, list):
        return [text for part in cell for text in texts_in(part)]
    if isinstance(cell, dict):
        lower = {str(name).lower(): value for name, value in cell.items()}
        named = next((lower[name] for name in ("raw", *CAPTION_COLUMNS) if name in lower), None)
        if named is not None:
            return texts_in(named)
        if cell and all(_LANGUAGE.fullmatch(str(name)) for name in cell):
            return [(text, name) for name, value in cell.items() for text, _ in texts_in(value)]
        texts = [value for value in cell.values() if isinstance(value, str)]
        return [(texts[0] if len(texts) == 1 else cell, "")]
    if isinstance(cell, bytes):
        with suppress(UnicodeDecodeError):
            return [(cell.decode(), "")]
    return [] if is_missing(cell) else [(cell, "")]
