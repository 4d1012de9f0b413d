"""One process at a time writes into a folder, on one host or on several that share its disk.

Processes of one host share a lock in the user's cache, which the system releases when its process ends, however it
ends. Other hosts, containers and users with another cache don't see that lock. For them a file beside the folder,
`.NAME.claim`, names the process at work. Its owner touches it every `BEAT` seconds and removes it at the end. A file
that has not been touched for `STALE` seconds was left by a process that is gone. Touches are detected by watching the
file, never by comparing clocks.
"""

from __future__ import annotations

import _thread
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litune.errors import OutputBusyError
from litune.files import cache_folder

try:
    import fcntl
except ImportError:  # on Windows only the file beside the folder is used
    fcntl = None  # type: ignore[assignment]

BEAT, STALE = 10.0, 60.0
"""Seconds between two touches of a claim, and seconds without a touch after which it is taken over."""
SETTLE = 1.0
"""Seconds after which it is settled which of several simultaneous takers has a claim."""
POLL = 0.5


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes from claiming `folder` until this one releases it or ends.

    Raises `OutputBusyError`, which names host and process, where another process is at work. Another host's claim is
    watched for up to `BEAT` seconds to find that out, and for `STALE` seconds before it is taken over.
    """
    folder = folder.resolve()
    locks = cache_folder() / "locks"
    locks.mkdir(exist_ok=True)
    with _locked(locks, folder) as locked:
        claimed = _claim_file(folder, _host(locks), locked)
        if claimed is None:
            yield
            return
        ended = threading.Event()
        beats = threading.Thread(target=_beat, args=(*claimed, ended), name="litune-claim", daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            _release(*claimed)


@contextmanager
def _locked(locks: Path, folder: Path) -> Iterator[bool]:
    """Hold this host's lock of the folder; yields False where the system has no locks."""
    if fcntl is None:
        yield False
        return
    with open(locks / hashlib.sha256(os.fsencode(folder)).hexdigest()[:32], "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise _busy(folder, lock.read() or "?") from None
        except OSError:  # a file system without locks
            yield False
            return
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield True


def _busy(folder: Path, process: str) -> OutputBusyError:
    return OutputBusyError(
        f"{folder} is being written by process {process}: wait until it has ended, or write somewhere else"
    )


def _host(locks: Path) -> str:
    """An identifier shared by all who see the same locks: the host's name, and a random id saved beside the locks."""
    file = locks / "host"
    with suppress(FileExistsError), open(file, "x", encoding="ascii") as new:
        new.write(uuid.uuid4().hex)
    return f"{socket.gethostname()} {file.read_text(encoding='ascii')}"


def _claim_file(folder: Path, host: str, locked: bool) -> tuple[Path, str] | None:
    """Claim the folder by the file beside it; returns file and content, or None where no file can be written there."""
    file = folder.with_name(f".{folder.name}.claim")
    own = json.dumps(
        {"host": host, "name": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex}, sort_keys=True
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(file, "x", encoding="utf-8") as new:
                new.write(own)
            return file, own
        except FileExistsError:
            current = _look(file)[0]
    except OSError:  # only the folder itself is writable, or its parent is no folder
        return None
    if not (locked and _parse(current).get("host") == host):
        _watch(folder, file, current)
        _write(file, own)
        time.sleep(SETTLE)
        if (now := _look(file)[0]) != own:
            raise _busy(folder, _owner(now))
        return file, own
    _write(file, own)  # left by a killed process of this host: we have the lock
    return file, own


def _watch(folder: Path, file: Path, content: str) -> None:
    """Return when a claim was not touched for `STALE` seconds. Raises `OutputBusyError` where it is touched."""
    touched, since = _look(file)[1], time.monotonic()
    print(f"{folder} is claimed by process {_owner(content)}: watching whether it is still at work", file=sys.stderr)
    while time.monotonic() - since < STALE:
        time.sleep(POLL)
        now, touched_now = _look(file)
        if not touched_now:  # it was released
            return
        if (now, touched_now) != (content, touched):
            raise _busy(folder, _owner(now))


def _look(file: Path) -> tuple[str, int]:
    """A claim's content and the time of its last touch in ns; "" and 0 where it is gone.

    The file is opened each time: a network file system then asks its server instead of its cache.
    """
    try:
        with open(file, encoding="utf-8", errors="replace") as claimed:
            return claimed.read(), os.fstat(claimed.fileno()).st_mtime_ns
    except FileNotFoundError:
        return "", 0


def _parse(claimed: str) -> dict[str, Any]:
    with suppress(ValueError):
        owner = json.loads(claimed)
        return owner if isinstance(owner, dict) else {}
    return {}


def _owner(claimed: str) -> str:
    owner = _parse(claimed)
    return f"{owner.get('process', '?')} on {owner.get('name', 'another host')}"


def _write(file: Path, own: str) -> None:
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")  # hosts can have equal process numbers
    temporary.write_text(own, encoding="utf-8")
    temporary.replace(file)


def _beat(file: Path, own: str, ended: threading.Event) -> None:
    """Touch the claim until `ended`; interrupt this process if it lost it by sleeping longer than `STALE`."""
    while not ended.wait(BEAT):
        with suppress(OSError):  # a network that is down for a moment
            if (now := _look(file)[0]) not in (own, ""):
                print(f"litune: {file} was taken over by process {_owner(now)}: stopping", file=sys.stderr)
                _thread.interrupt_main()
                return
            os.utime(file)


def _release(file: Path, own: str) -> None:
    with suppress(OSError):
        if _look(file)[0] == own:
            file.unlink()
