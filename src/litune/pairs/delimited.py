"""Tables of lines: cells between commas, tabs, semicolons or bars, quoted or not, with or without a header."""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from litune.errors import DataError
from litune.pairs.sample import IMAGE_COLUMNS, MOST_TEXT, SPLITS, Damage, is_picture

DELIMITERS = (",", "\t", "|", ";")
LOOKED_AT = 50
"""So many rows of a table without a header tell what its columns hold."""
MOST_LINES = 200
"""The most lines of a quoted cell; a quote that is not closed within them is none."""
DIALECTS: tuple[dict[str, Any], ...] = ({"doublequote": True}, {"doublequote": False, "escapechar": "\\"})
"""How quoted cells are written: by RFC 4180, or with a backslash before quotes (Spark, MySQL)."""

_FLICKR = re.compile(r"[^\t]+#\d+\t")
_LANGUAGE = re.compile(r"[a-z]{2}(-[A-Za-z]{2,4})?")

csv.field_size_limit(MOST_TEXT)


def read_delimited(file: str, opened: TextIO, suffix: str) -> Iterator[tuple[str, dict[str, Any]] | Damage]:
    """The rows of a table, every cell as text: a caption of digits stays a caption.

    Raises `DataError` where it is not a table, or where it has no header and its columns can't be told apart.
    """
    name = file.rpartition("/")[2]
    lines: Iterator[str] = (line.rstrip("\n") for line in iter(lambda: opened.readline(MOST_TEXT), ""))
    head = next(lines, None)
    if head is None:
        raise DataError(f"{file} is empty: expected a table of image paths and captions")
    marked = re.fullmatch(r"sep=(.)", head)  # Excel's
    if marked:
        head = next(lines, "")
    delimiter, names = _header(head, marked[1] if marked else "", suffix)
    if not delimiter:
        raise DataError(f"{file} is not a table litune reads: expected .csv, .tsv, .jsonl, .parquet or Flickr's lists")
    duplicated = {column for column in names if column and names.count(column) > 1}
    if duplicated:
        raise DataError(f"{file} has the column {min(duplicated)!r} more than once: rename one")
    if names:
        rows = _records(lines, delimiter, len(names))
    else:
        rows = _records(itertools.chain([head], lines), delimiter, len(_split(head, delimiter)))
        first = list(itertools.islice(rows, LOOKED_AT))
        names = _told_apart(file, head, [cells for cells in first if isinstance(cells, list)])
        rows = itertools.chain(first, rows)
    for number, cells in enumerate(rows, 1):
        where = f"row {number} of {name}"
        if isinstance(cells, str):
            yield Damage(where, cells)
        elif any(cells) and len(cells) != len(names):
            yield Damage(where, f"it has {len(cells)} cells, the table has {len(names)} columns")
        elif any(cells):
            row = dict(zip(names, cells, strict=True))
            if "image#" in row:  # Flickr's lists: photo.jpg#0
                row["image"] = re.sub(r"#\d+$", "", row.pop("image#"))
            yield where, row


def _header(line: str, delimiter: str, suffix: str) -> tuple[str, list[str]]:
    """The delimiter, and the names of the columns in a table's first line: none where it is a row; "" for no table.

    A table without a header is recognised by a picture in its first line.
    """
    if _FLICKR.match(line):
        return "\t", []
    expected = delimiter or ("\t" if suffix == ".tsv" else ",")
    for delimiter in sorted(DELIMITERS, key=lambda one: one != expected):
        cells = _split(line, delimiter)
        if any(map(is_picture, cells)) and len(cells) > 1:
            return delimiter, []
        if {cell.lower() for cell in cells} & set(IMAGE_COLUMNS) and len(cells) > 1:
            return delimiter, cells
    if is_picture(line):
        return expected, []
    if suffix not in (".csv", ".tsv"):
        return "", []
    several = [delimiter for delimiter in (expected, *DELIMITERS) if len(_split(line, delimiter)) > 1]
    delimiter = next(iter(several), expected)
    return delimiter, _split(line, delimiter)


def _split(line: str, delimiter: str) -> list[str]:
    cells = next(_records(iter([line]), delimiter, line.count(delimiter) + 1), [])
    return [cell.strip() for cell in cells] if isinstance(cells, list) else []


def _told_apart(file: str, head: str, rows: Sequence[list[str]]) -> list[str]:
    """Names for the columns of a table without a header, by what its first rows hold."""
    if _FLICKR.match(head):
        return ["image#", "caption"]
    width = len(rows[0])
    columns = [[row[i].strip() for row in rows if len(row) == width] for i in range(width)]
    kinds = [_kind_of(column) for column in columns]
    texts = [i for i, kind in enumerate(kinds) if kind == "caption"]
    if not texts and width == 2 and "number" in kinds:
        kinds[kinds.index("number")] = "caption"
    names = [kind if kind not in kinds[:i] else f"{kind}_{i}" for i, kind in enumerate(kinds)]
    if len(texts) > 1:
        cells = ", ".join(f"{columns[i][0]:.30}" for i in texts)
        raise DataError(
            f"{file} has no names of columns in its first line, and several columns may be its captions ({cells}): "
            "write the names above, as in image,caption,split"
        )
    return names


def _kind_of(cells: Sequence[str]) -> str:
    """What a column holds: image, split, number, url, lang or, in all other cases, caption."""
    values = [cell for cell in cells if cell]
    kinds: dict[str, Callable[[str], bool]] = {
        "image": is_picture,
        "split": lambda cell: cell.lower() in SPLITS,
        "number": lambda cell: re.fullmatch(r"[-+]?[\d.]+", cell) is not None,
        "url": lambda cell: re.match(r"https?://\S+$", cell) is not None,
        "lang": lambda cell: _LANGUAGE.fullmatch(cell) is not None,
    }
    return next((kind for kind, holds in kinds.items() if values and all(map(holds, values))), "caption")


def _records(lines: Iterator[str], delimiter: str, columns: int) -> Iterator[list[str] | str]:
    """The rows' cells; or why a row can't be read.

    A cell in quotes may go on over several lines. Between tabs, what can't be read as a quoted cell is text with quotes
    in it; between bars no cell is quoted.
    """
    ahead: deque[str] = deque()
    while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
        plain = line.split(delimiter)
        if delimiter == "|":
            yield [cell.strip() for cell in plain]
            continue
        if not any(cell.lstrip(" ").startswith('"') for cell in plain):
            yield [_unescaped(cell) for cell in plain] if '\\"' in line else plain
            continue
        cells = _quoted(line, delimiter, columns)
        if cells is None:
            cells = _continued(line, lines, ahead, delimiter, columns)
        if cells is not None:
            yield cells
        elif delimiter == "\t":
            yield [_unquoted(cell) for cell in plain]
        else:
            yield _complaint(line, delimiter)


def _quoted(text: str, delimiter: str, columns: int) -> list[str] | None:
    """The cells of one row in one of the `DIALECTS`; None where the text is no row of so many in any."""
    for dialect in DIALECTS:
        if "escapechar" in dialect and '\\"' not in text:
            continue
        try:
            rows = list(
                csv.reader(
                    text.splitlines(keepends=True), delimiter=delimiter, strict=True, skipinitialspace=True, **dialect
                )
            )
        except csv.Error:
            continue
        if len(rows) == 1 and len(rows[0]) == columns:
            return rows[0]
    return None


def _continued(line: str, lines: Iterator[str], ahead: deque[str], delimiter: str, columns: int) -> list[str] | None:
    """The cells of a row that goes on over the next lines; where it does not, None, and the lines are put `ahead`."""
    pictures = [i for i, cell in enumerate(line.split(delimiter)) if is_picture(cell.strip('" '))]
    text, read = line, list[str]()
    while _open(text) and len(read) < MOST_LINES:
        following = ahead.popleft() if ahead else next(lines, None)
        if following is None:
            break
        read.append(following)
        cells = _quoted(following, delimiter, columns) or following.split(delimiter)
        if len(cells) == columns and any(is_picture(cells[i].strip('" ')) for i in pictures):
            break  # a row of its own
        text = f"{text}\n{following}"
        if '"' in following and (joined := _quoted(text, delimiter, columns)) is not None:
            return joined
    ahead.extendleft(reversed(read))
    return None


def _open(text: str) -> bool:
    """Whether a quote may be open at the end of a text."""
    return text.count('"') % 2 == 1 or text.replace('\\"', "").count('"') % 2 == 1


def _unescaped(cell: str) -> str:
    """A cell without the backslashes before its quotes; in a list, they are the list's own."""
    return cell if cell.lstrip()[:1] in tuple("[({") else cell.replace('\\"', '"')


def _complaint(line: str, delimiter: str) -> list[str] | str:
    """Why a line can't be read; its cells where it has a wrong number of them."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as why:
        return f"it can't be read: {'a quote is not closed' if 'end of data' in str(why) else why}"


def _unquoted(cell: str) -> str:
    """A tab-separated cell without the quotes that spreadsheets put around cells that contain quotes."""
    inside = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return cell
