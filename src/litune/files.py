"""Atomic writes: no half-written file ever has its final name. Text files in whatever encoding they come."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litune.errors import LituneError, OutputExistsError
from litune.progress import say

_UMASK = os.umask(0)
os.umask(_UMASK)

LFS_POINTER = b"version https://git-lfs.github.com/"
"""How a file begins that Git LFS has left in the place of a large one."""

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # the names that `atomic` gives
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's mark does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_BEYOND_ASCII, _STRANGE = re.compile(r"[^\x00-\x7f]"), re.compile(r"[\udc80-\udcff]")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to the disk and rename it to `path`.

    On any error the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # some writers make their files private
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: without it, a power failure can undo a rename."""
    with suppress(OSError):  # Windows can't open folders, and some file systems can't flush them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(new: Path, target: Path, last: str) -> None:
    """Replace the files of `target` by those of `new`, the one named `last` at the end, and remove `new`.

    `target` and its files exist throughout, and each file is either the old or the new one. (Only a few Linux file
    systems can swap two folders atomically.) `last` must be written last into `new`, since it marks the rest as
    complete: after a kill, the same call finishes a replacement, and removes a `new` that is incomplete.
    """
    if (new / last).exists():
        if target.exists():
            for file in sorted(new.iterdir(), key=lambda file: file.name == last):
                file.replace(target / file.name)
            sync_folder(target)
        else:
            new.replace(target)
        sync_folder(target.parent)
    shutil.rmtree(new, ignore_errors=True)


def encoding_of(data: bytes) -> str:
    """The encoding of a text by its first bytes: UTF-8, UTF-16 or UTF-32 (with or without a mark), else Latin-1.

    Latin-1 is Windows' extension of it, cp1252, where all bytes have a character there. Bytes with control characters,
    those of which most are not ASCII (other alphabets) and those that are mostly UTF-8 count as damaged UTF-8.
    """
    if marked := next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None):
        return marked
    nuls = [data[first::2].count(0) for first in (0, 1)]
    if sum(nuls) > len(data) // 4:  # most characters have a byte of zeros
        return "utf-16-le" if nuls[1] > nuls[0] else "utf-16-be"
    text = data.decode("utf-8", "surrogateescape")
    strange = len(_STRANGE.findall(text))
    if len(_BEYOND_ASCII.findall(text)) >= 2 * strange or 2 * strange > len(data) or _CONTROL.search(data):
        return "utf-8"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


def is_latin(encoding: str) -> bool:
    """Whether this is what `encoding_of` says of a text that is neither UTF-8 nor UTF-16: a guess, to be told of."""
    return encoding in ("cp1252", "latin-1")


def decode_text(data: bytes) -> str:
    """A text file's bytes as text, in the encoding that it is in. Raises `UnicodeDecodeError` where it is no text."""
    return data.decode(encoding_of(data))


def read_text(path: Path) -> str:
    """A text file in whatever encoding it is, with newlines at the ends of lines; says so where it is Latin-1.

    Raises `OSError`, or `UnicodeDecodeError` where it is no text.
    """
    data = path.read_bytes()
    tell_latin(str(path), encoding_of(data))
    return decode_text(data).replace("\r\n", "\n").replace("\r", "\n")


def tell_latin(name: str, encoding: str) -> None:
    """Say that a file is read as Latin-1, if it is."""
    if is_latin(encoding):
        say(f"{name} is not UTF-8: it is read as Latin-1 (Windows-1252); save it as UTF-8 if its letters are wrong")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, error: type[LituneError]) -> dict[str, Any]:
    """Read a JSON object; `error` with one line if it is missing or damaged."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as why:
        raise error(f"{path} is not valid JSON ({why}): restore it or make it anew") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def sweep_temporaries(folder: Path) -> None:
    """Remove the temporary files that a killed writer left under `folder`."""
    for pattern in (".*.tmp", ".tmp??????"):  # ours, and those of safetensors
        for path in folder.rglob(pattern):
            with suppress(FileNotFoundError):
                path.unlink()


def holds_nothing(folder: Path) -> bool:
    """Whether a folder has no files but those that a writer was killed in: nothing was made there yet."""
    return all(_TEMPORARY.fullmatch(path.name) and path.is_file() for path in folder.iterdir())


def check_file(file: Path | None, option: str, overwrite: bool) -> None:
    """Before the work: raise `OutputExistsError` where the file that `option` names is there and is to be kept."""
    if file is not None and (file.is_dir() or (file.exists() and not overwrite)):
        raise OutputExistsError(f"{file} exists: choose another {option}, or give --overwrite")


def clear_output(folder: Path, ours: bool, what: str, overwrite: bool) -> None:
    """Make way for a new `what` at `folder`: refuse if it exists, or remove it when `overwrite` is set.

    A folder that is not `ours`, that litune did not write, is never removed.
    """
    if folder.is_file():
        raise OutputExistsError(f"{folder} is a file, expected a folder for the {what}: choose another --out")
    if not folder.exists() or holds_nothing(folder):
        return
    if not ours:
        raise OutputExistsError(f"{folder} is not empty and not {_a(what)} of litune: choose another --out")
    if not overwrite:
        raise OutputExistsError(f"{folder} already holds {_a(what)}: choose another --out, or give --overwrite")
    shutil.rmtree(folder)


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def cache_folder() -> Path:
    """The user's folder for what can be made again; a temporary one where it can't be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litune"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="litune-"))


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
