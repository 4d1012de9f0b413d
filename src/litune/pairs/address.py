"""Local and remote files: addresses, patterns that match many files, and reading part of a file.

An address is a path, or a URL that fsspec knows (s3://, gs://, hf://, memory://, …).
"""

from __future__ import annotations

import io
import itertools
import os
import re
import stat
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from litune.errors import DataError, MissingExtraError
from litune.files import encoding_of, tell_latin

MOST_FILES = 1_000_000
"""A pattern that expands to more files than this is taken for a typing mistake."""

BUFFER = 1 << 16
HEAD = 16 << 20
"""The encoding of a text is told by so many of its first bytes."""

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)$")


def is_url(address: str | Path) -> bool:
    """Whether an address is a URL for fsspec, not a path in the local file system."""
    return _URL.match(str(address)) is not None


def local(address: str | Path) -> str:
    """An address without file://, as the file system takes it."""
    return re.sub(r"^(file|local)://", "", str(address))


def is_pattern(address: str) -> bool:
    """Whether an address stands for several files: {00000..00099}, {a,b}, * or ?."""
    return bool(_BRACES.search(address)) or has_magic(address)


def expand(address: str) -> list[str]:
    """The files that a pattern expands to: braces in the order written, matches of a * sorted.

    Files from braces need not exist. Raises `DataError` if nothing matches.
    """
    files: list[str] = []
    for pattern in _braces(address):
        if not has_magic(pattern):
            files.append(pattern)
        elif is_url(pattern):
            system, path = _system(pattern)
            files += sorted(system.unstrip_protocol(p) for p in _call(pattern, system.glob, path))
        else:
            files += sorted(glob(pattern))  # noqa: PTH207 (a pattern may be absolute)
    if not files:
        raise DataError(f"no file is named like {address}")
    return files


def _braces(address: str) -> list[str]:
    match = _BRACES.search(address)
    if match is None:
        return [address]
    inside = match.group(1)
    if numbers := _RANGE.match(inside):
        first, last = numbers.groups()
        if int(last) - int(first) >= MOST_FILES:
            raise DataError(f"{address} stands for more than {MOST_FILES:,} files: write a smaller range")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    rest = _braces(address[match.end() :])
    if len(choices) * len(rest) > MOST_FILES:
        raise DataError(f"{address} stands for more than {MOST_FILES:,} files: write a smaller range")
    return [address[: match.start()] + choice + after for choice, after in itertools.product(choices, rest)]


def folder_of(address: str) -> str:
    """The folder that a file is in; the slashes of a URL stay as they are."""
    return address.rpartition("/")[0] if is_url(address) else str(Path(address).parent)


def files_under(folder: str) -> list[str]:
    """All files under a remote folder, as addresses, sorted."""
    system, path = _system(folder)
    return sorted(_address(folder, system, path, file) for file in _call(folder, system.find, path))


def folders_in(folder: str) -> list[str]:
    """The folders directly in a folder, as addresses, sorted; hidden ones are left out."""
    if not is_url(folder):
        return sorted(str(p) for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    system, path = _system(folder)
    entries = _call(folder, system.ls, path, detail=True)
    names = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
    return sorted(_address(folder, system, path, p) for p in names if not p.rpartition("/")[2].startswith("."))


def _address(folder: str, system: Any, path: str, entry: str) -> str:
    """The address of `entry`, which a file system listed under a folder, spelled as the folder's address is."""
    inside = f"{path.rstrip('/')}/"
    if not entry.startswith(inside):
        return str(system.unstrip_protocol(entry))
    return f"{folder.rstrip('/')}/{entry.removeprefix(inside)}"


def is_file(address: str) -> bool:
    """Whether there is a file at an address."""
    if not is_url(address):
        return os.path.isfile(address)  # noqa: PTH113 (a Path would cost more than the question)
    if address.endswith("/"):  # fsspec takes a folder on a web server for a file
        return False
    system, path = _system(address)
    return bool(_call(address, system.isfile, path))


def open_file(address: str) -> BinaryIO:
    """A file, open for reading. Raises `OSError`, or `DataError` where it is not a regular file."""
    if is_url(address):
        system, path = _system(address)
        return io.BufferedReader(_Elsewhere(address, _call(address, system.open, path, "rb")), BUFFER)
    if not stat.S_ISREG(os.stat(address).st_mode):  # noqa: PTH116
        raise DataError(f"{address} is not a regular file")
    return open(address, "rb")


def open_text(address: str) -> io.TextIOWrapper:
    """A text file in whatever encoding it is, open for reading; says so where it is Latin-1.

    Bytes that are no character become lone surrogates. Raises what `open_file` raises.
    """
    file = open_file(address)
    head = file.read(HEAD)
    encoding = encoding_of(head[: head.rfind(b"\n") + 1] if len(head) == HEAD else head)
    file.seek(0)
    tell_latin(address, encoding)
    return io.TextIOWrapper(file, encoding, "surrogateescape")


class _Elsewhere(io.RawIOBase):
    """A file opened by fsspec; failures of any kind are raised as `OSError`."""

    def __init__(self, address: str, file: Any) -> None:
        self._address, self._file = address, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _call(self._address, self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def close(self) -> None:
        super().close()
        self._file.close()


def size_of(file: BinaryIO) -> int:
    """The number of bytes of an open file."""
    here = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(here)
    return size


def read_part(address: str, start: int, length: int) -> bytes:
    """`length` bytes from `start` on, fewer if the file ends earlier. Raises what `open_file` raises."""
    if is_url(address):
        system, path = _system(address)
        data = cast(bytes, _call(address, system.cat_file, path, start=start, end=start + length))
        if len(data) > length:
            raise OSError(f"{address}: the server gives whole files, no parts of them: copy the file to this machine")
        return data
    with open_file(address) as file:
        return os.pread(file.fileno(), length, start)


def read_all(address: str, most: int) -> bytes:
    """The bytes of a whole file. Raises what `open_file` raises, and `DataError` for more than `most` bytes."""
    with open_file(address) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise DataError(f"the file has more than {most:,} bytes")
    return data


def _system(address: str) -> tuple[Any, str]:
    """Fsspec's file system for an address, and the path in it. Raises `DataError` where fsspec knows none."""
    try:
        system, path = url_to_fs(address)
    except ImportError as why:
        for protocol, package, extra in (("s3", "s3fs", "s3"), ("http", "aiohttp", "http")):
            if address.startswith(protocol):
                raise MissingExtraError(address, package, extra) from None
        raise DataError(f"{address} can't be read: {why}") from None
    except ValueError as why:
        raise DataError(f"{address} can't be read ({why}): give a path, or a URL that fsspec knows") from None
    return system, path


def _call(address: str, function: Any, *args: Any, **settings: Any) -> Any:
    """The result of a file system's function; failures of any kind are raised as `OSError`."""
    try:
        return function(*args, **settings)
    except OSError:
        raise
    except Exception as why:  # each service has exceptions of its own
        reason = (str(why) or type(why).__name__).splitlines()[0]
        raise OSError(f"{address} can't be read: {reason}") from None
