"""Writing that never leaves a half-written file under its final name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litune.errors import LituneError, OutputBusyError, OutputExistsError

try:
    import fcntl
except ImportError:  # not on Windows: nothing is claimed there
    fcntl = None  # type: ignore[assignment]

_UMASK = os.umask(0)
os.umask(_UMASK)


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
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


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
        value = json.loads(path.read_text(encoding="utf-8"))
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


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes from claiming `folder`, until this one lets go or ends, however it ends.

    The lock is a file in the user's cache: there is nothing to clear away in `folder`, or beside it. Raises
    `OutputBusyError` where another process is at work.
    """
    if fcntl is None:
        yield
        return
    locks = cache_folder() / "locks"
    locks.mkdir(exist_ok=True)
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    with open(locks / name, "a+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise OutputBusyError(
                f"{folder} is being written by process {lock.read() or '?'}: wait until it has ended, or write "
                "somewhere else"
            ) from None
        except OSError:  # a file system that has no locks: nothing is claimed there
            yield
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def clear_output(folder: Path, ours: bool, what: str, overwrite: bool) -> None:
    """Make way for a new `what` at `folder`: refuse if it exists, or remove it when `overwrite` is set.

    A folder that is not `ours`, that litune did not write, is never removed.
    """
    if folder.is_file():
        raise OutputExistsError(f"{folder} is a file, expected a folder for the {what}: choose another --out")
    if not folder.exists() or not any(folder.iterdir()):
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
