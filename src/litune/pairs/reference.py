"""Where a picture's bytes are: one line of text that reads back the same bytes, in whatever file they lie.

    /data/a.jpg                             a file, or a URL that fsspec knows
    /data/00000.tar::1536+20480::0001.jpg   a member of a tar: its first byte, its length, its name
    /data/a.parquet::3/17::image            row 17 of row group 3, the column `image` (an Arrow file has one group)
    /data/test_batch::17::pixels            row 17 of the array in one of CIFAR's batches

Nothing is ever unpacked: a member's name is never used as a path.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from litune.errors import DataError
from litune.pairs.address import folder_of, is_file, is_url, local, open_file, read_all, read_part
from litune.pairs.cifar import Pixels, read_png

MOST_BYTES = 1 << 29
"""A picture's file has at most half a gigabyte."""
SPAN = 32 << 20
"""Neighbours in a tar are read at once, up to so many bytes."""
GROUPS_KEPT = 4
"""Row groups that stay in memory: as many as threads may be reading."""
BLOCK = tarfile.BLOCKSIZE
BROKEN = (pa.ArrowException, ValueError, OSError)
"""What a damaged file raises in Arrow; names that are not UTF-8 are a `ValueError`."""

_MEMBER = re.compile(r"(.+?)::(\d+)\+(\d+)::(.*)", re.DOTALL)
_ROW = re.compile(r"(.+?)::(\d+)/(\d+)::(.*)", re.DOTALL)
_PIXELS = re.compile(r"(.+?)::(\d+)::pixels", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its bytes begin, how many they are, its name."""

    shard: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.shard}::{self.offset}+{self.size}::{self.name}"


@dataclass(frozen=True)
class PictureCell:
    """A picture in a column of a Parquet or Arrow file."""

    file: str
    group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}::{self.group}/{self.row}::{self.column}"


Place = Member | PictureCell | Pixels | str


def parse(reference: str) -> Place:
    """What a reference points to; a plain address is itself."""
    if "::" in reference:
        if found := _MEMBER.fullmatch(reference):
            return Member(found[1], int(found[2]), int(found[3]), found[4])
        if found := _ROW.fullmatch(reference):
            return PictureCell(found[1], int(found[2]), int(found[3]), found[4])
        if found := _PIXELS.fullmatch(reference):
            return Pixels(found[1], int(found[2]))
    return reference


def names_of(keys: pa.ChunkedArray, references: pa.ChunkedArray) -> Callable[[int], str]:
    """What gives the `name_of` an image by its row."""
    return lambda row: name_of(keys[row].as_py(), references[row].as_py())


def name_of(key: str, reference: str) -> str:
    """An image's name for messages, with the file that it lies in where that holds many images.

    >>> name_of("00000/12", "/data/00000.tar::1536+20480::12.jpg")
    '00000/12 in /data/00000.tar'
    """
    place = parse(reference)
    if isinstance(place, Member):
        return f"{key} in {place.shard}"
    return f"{key} in {place.file}" if isinstance(place, PictureCell) else key


def is_there(reference: str) -> bool:
    """Whether the file is there that a reference points into; of a file elsewhere that is not asked."""
    file = file_of(reference)
    return is_url(file) or is_file(file)


def file_of(reference: str) -> str:
    """The file that a picture is in, or is.

    >>> file_of("/data/00000.tar::1536+20480::12.jpg"), file_of("/data/a.jpg")
    ('/data/00000.tar', '/data/a.jpg')
    """
    place = parse(reference)
    if isinstance(place, Member):
        return place.shard
    return place if isinstance(place, str) else place.file


def absolute(reference: str) -> str:
    """The reference as it can be read from any folder."""
    reference = local(reference)
    return reference if is_url(reference) else os.path.abspath(reference)  # noqa: PTH100 (keeps ::, unlike Path)


def read_bytes(reference: str | Path) -> bytes:
    """The bytes of the picture that a reference points to.

    Raises `DataError` or `OSError` with the reason where they are not there any more.
    """
    place = parse(str(reference))
    if isinstance(place, Member):
        return _cut(place, _fetch(place.shard, place.offset - BLOCK, place.offset + place.size), place.offset - BLOCK)
    if isinstance(place, PictureCell):
        return _rows.read(place)
    if isinstance(place, Pixels):
        return read_png(place)
    return read_all(local(place), MOST_BYTES)


def read_each(references: Sequence[str]) -> Iterator[bytes | DataError | OSError]:
    """For each reference its bytes, or why they can't be read; neighbours in a tar in one sequential read."""
    places = [parse(reference) for reference in references]
    begin = 0
    while begin < len(places):
        end = _run(places, begin)
        first = places[begin]
        if isinstance(first, Member) and end - begin > 1:
            last = places[end - 1]
            assert isinstance(last, Member)
            start = first.offset - BLOCK
            try:
                span: bytes | DataError | OSError = _fetch(first.shard, start, last.offset + last.size)
            except (DataError, OSError) as why:
                span = why
            for place in places[begin:end]:
                assert isinstance(place, Member)
                yield _try_cut(place, span, start) if isinstance(span, bytes) else span
        else:
            try:
                yield read_bytes(references[begin])
            except (DataError, OSError) as why:
                yield why
        begin = end


def _run(places: Sequence[Place], begin: int) -> int:
    """The end of the run of members that lie behind each other in one tar, of at most SPAN bytes."""
    first = places[begin]
    end = begin + 1
    while isinstance(first, Member) and end < len(places):
        one, before = places[end], places[end - 1]
        assert isinstance(before, Member)
        if not isinstance(one, Member) or one.shard != first.shard or one.offset < before.offset + before.size:
            break
        if one.offset + one.size - first.offset > SPAN:
            break
        end += 1
    return end


def _fetch(shard: str, start: int, stop: int) -> bytes:
    if start < 0 or stop - start > MOST_BYTES:
        raise DataError(f"{stop - start:,} bytes in {shard}, expected at most {MOST_BYTES:,}")
    return read_part(local(shard), start, stop - start)


def _try_cut(place: Member, span: bytes, start: int) -> bytes | DataError:
    try:
        return _cut(place, span, start)
    except DataError as why:
        return why


def _cut(place: Member, span: bytes, start: int) -> bytes:
    """A member's bytes out of a part of the tar that begins at `start`; its header must still stand before it."""
    at = place.offset - start
    data = span[at : at + place.size]
    if len(data) < place.size:
        raise DataError(f"{place.shard} ends in the middle of {place.name}")
    try:
        header = tarfile.TarInfo.frombuf(span[at - BLOCK : at], "utf-8", "replace")
    except tarfile.HeaderError:
        header = None
    if header is None or header.size != place.size or not header.isreg():
        raise DataError(f"{place.shard} has changed: {place.name} is not at byte {place.offset} any more")
    return data


class _Rows:
    """Pictures in columns; the row groups read last are kept, since neighbours are asked for one by one."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, str], tuple[pa.ChunkedArray, pa.ChunkedArray | None]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, place: PictureCell) -> bytes:
        # One reader at a time: two threads in one row group would both read all of it.
        with self._lock:
            key = (place.file, place.group, place.column)
            if key not in self._kept:
                self._kept[key] = read_group(*key)
                while len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            pictures, paths = self._kept[key]
            if place.row >= len(pictures):
                raise DataError(f"{place.file} has changed: row group {place.group} has no row {place.row} any more")
            data: bytes | None = pictures[place.row].as_py()
            path = paths[place.row].as_py() if paths is not None and data is None else None
        if data is None and path:
            path = local(path) if is_url(path) or path.startswith("/") else f"{folder_of(place.file)}/{path}"
            try:
                return read_all(path, MOST_BYTES)
            except FileNotFoundError:
                raise DataError(f"{path}, which it names, does not exist") from None
        if data is None:
            raise DataError("the cell has no picture")
        return data


_rows = _Rows()


def read_group(file: str, group: int, column: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """The pictures of a row group as bytes and, where the column is one of structs, their paths.

    Raises `DataError` where the file is damaged or has changed.
    """
    try:
        if file.endswith(".arrow"):
            found = open_arrow(file)[column]
        else:
            with open_file(local(file)) as opened, pa.parquet.ParquetFile(opened) as parquet:
                size = parquet.metadata.row_group(group).total_byte_size
                if size > 4 * MOST_BYTES:
                    raise DataError(
                        f"row group {group} of {file} has {size / 1e9:.1f} GB: write the file anew with smaller ones"
                    )
                found = parquet.read_row_group(group, columns=[column])[column]
        found.validate(full=True)
    except (pa.ArrowException, ValueError, KeyError, IndexError, OverflowError) as why:
        raise DataError(f"{file} is damaged or has changed: {first_line(why)}") from None
    if not pa.types.is_struct(found.type):
        return found, None
    fields = [found.type.field(i).name for i in range(found.type.num_fields)]
    chunks = found.chunks
    return (
        pa.chunked_array([c.field("bytes") for c in chunks], found.type.field("bytes").type),
        pa.chunked_array([c.field("path") for c in chunks], pa.string()) if "path" in fields else None,
    )


def open_arrow(file: str) -> pa.Table:
    """The table in an Arrow file on this machine, memory-mapped: it takes no memory of its own.

    Raises `DataError` where it is damaged.
    """
    try:
        source = pa.memory_map(local(file))
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_stream(source).read_all()
        table.validate(full=True)  # offsets that point outside would end the process
    except BROKEN as why:
        raise DataError(f"{file} can't be read: {first_line(why)}") from None
    return table


def first_line(why: Any) -> str:
    """A library's error in one line."""
    return (str(why) or type(why).__name__).splitlines()[0]


def open_picture(path: str) -> BinaryIO:
    """The bytes of the picture that a reference points to, as a file to read."""
    if is_url(path) or not isinstance(parse(path), str):
        return io.BytesIO(read_bytes(path))
    return open_file(path)  # of a plain file the header alone may be enough
