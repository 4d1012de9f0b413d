"""One process at a time writes into a folder, on one host or on several that share its disk.

Among the processes of one host a lock in the user's cache decides. The system lets go of it when its process ends,
however it ends. Others don't see that lock: other hosts, containers, users with a cache of their own. For them a file
beside the folder, `.NAME.claim`, names who is at work. Its owner touches it every `BEAT` seconds while it works and
removes it at the end. One that nobody has touched for `STALE` seconds was left by a process that is gone. Whether it is
touched is told by watching it, never by comparing clocks.
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
except ImportError:  # not on Windows: there the file beside the folder decides alone
    fcntl = None  # type: ignore[assignment]

BEAT, STALE = 10.0, 60.0
"""Seconds between two touches of a claim, and seconds without one after which it is taken over."""
SETTLE = 1.0
"""Seconds after which it has shown which of several that took over a claim at once has it."""
POLL = 0.5


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes from claiming `folder` until this one lets go or ends.

    Raises `OutputBusyError`, which names host and process, where another one is at work. A claim of another host is
    watched for up to `BEAT` seconds to see that, and for `STALE` seconds before it is taken over.
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
    """Hold this host's lock of the folder; yields whether there are locks here at all."""
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
    """What those have in common who see the same locks: a host's name, and a number that lies beside its locks."""
    file = locks / "host"
    with suppress(FileExistsError), open(file, "x", encoding="ascii") as new:
        new.write(uuid.uuid4().hex)
    return f"{socket.gethostname()} {file.read_text(encoding='ascii')}"


def _claim_file(folder: Path, host: str, locked: bool) -> tuple[Path, str] | None:
    """Claim the folder by the file beside it: the file and what it says. None where no file can be written there."""
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
            there = _look(file)[0]
    except OSError:  # a folder that only itself can be written to, or what `folder` is in is no folder
        return None
    if not (locked and _facts(there).get("host") == host):
        _watch(folder, file, there)
        _write(file, own)
        time.sleep(SETTLE)
        if (now := _look(file)[0]) != own:
            raise _busy(folder, _owner(now))
        return file, own
    _write(file, own)  # left by a process of this host that was killed: we have the lock
    return file, own


def _watch(folder: Path, file: Path, there: str) -> None:
    """Return when nobody has touched a claim for `STALE` seconds; raises `OutputBusyError` where somebody does."""
    touched, since = _look(file)[1], time.monotonic()
    print(f"{folder} is claimed by process {_owner(there)}: watching whether it is still at work", file=sys.stderr)
    while time.monotonic() - since < STALE:
        time.sleep(POLL)
        now, then = _look(file)
        if not then:  # it was let go
            return
        if (now, then) != (there, touched):
            raise _busy(folder, _owner(now))


def _look(file: Path) -> tuple[str, int]:
    """What a claim says and when it was touched last; "" and 0 where it is gone.

    It is opened anew each time: a network file system then asks its server and not its cache.
    """
    try:
        with open(file, encoding="utf-8", errors="replace") as claimed:
            return claimed.read(), os.fstat(claimed.fileno()).st_mtime_ns
    except FileNotFoundError:
        return "", 0


def _facts(claimed: str) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(claimed)
        return found if isinstance(found, dict) else {}
    return {}


def _owner(claimed: str) -> str:
    facts = _facts(claimed)
    return f"{facts.get('process', '?')} on {facts.get('name', 'another host')}"


def _write(file: Path, own: str) -> None:
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")  # hosts can have equal process numbers
    temporary.write_text(own, encoding="utf-8")
    temporary.replace(file)


def _beat(file: Path, own: str, ended: threading.Event) -> None:
    """Touch the claim until `ended`. Who lost it, having slept for longer than `STALE`, is interrupted."""
    while not ended.wait(BEAT):
        with suppress(OSError):  # a network that is away for a moment
            if (now := _look(file)[0]) not in (own, ""):
                print(f"litune: {file} was taken over by process {_owner(now)}: stopping", file=sys.stderr)
                _thread.interrupt_main()
                return
            os.utime(file)


def _release(file: Path, own: str) -> None:
    with suppress(OSError):
        if _look(file)[0] == own:
            file.unlink()
