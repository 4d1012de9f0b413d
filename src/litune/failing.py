"""A rank that fails tells the others why, and all of them end instead of waiting for it.

torchrun ends the others when one has ended. But other launchers don't, and a process can hang at exit, in the threads
of a collective. So each rank polls the rendezvous store for the failure of another one. Rank 0 prints for all.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, cast

import torch.distributed as dist

POLL = 0.5
"""Seconds between two polls."""
LINGER = 2.0
"""Seconds that rank 0 stays after a failure, so that the others see it: it may host the store. Other ranks stay twice
as long: a launcher ends rank 0 as soon as one of them has ended, and rank 0 should print the reason before."""


class MainRankError(RuntimeError):
    """Rank 0, which was working for all, has failed; it prints the reason itself."""


class Watch:
    """One rank's watch, from the start of the group to `close`; an uncaught exception is a failure."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.key = f"litune/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A separate connection: the group's may be blocked by a waiting call.
        self.store = cast(Any, dist).TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30)
        )
        self.closed = threading.Event()
        self.leaving = threading.Lock()
        self.hook = sys.excepthook
        sys.excepthook = self.uncaught
        self.thread = threading.Thread(target=self._look, name="litune-watch", daemon=True)
        self.thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()
        self.thread.join()
        atexit.unregister(self.close)
        if sys.excepthook == self.uncaught:
            sys.excepthook = self.hook

    def leave(self, line: str, why: str, code: int) -> None:
        """Tell the others why this rank fails, print `line`, and end this process."""
        self._tell(why)
        self._end(line, code)

    def uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """The interpreter's hook for uncaught exceptions."""
        if isinstance(error, MainRankError):
            self._end("", 1)
        own = " ".join(f"{kind.__name__}: {error}".split())
        first = self._tell(own)
        if first != self._named(own):  # this failure is a consequence of that one
            self._follow(first)
        self.hook(kind, error, trace)
        self._end("", 1)

    def _named(self, why: str) -> str:
        return f"rank {self.rank}: {why}"

    def _tell(self, why: str) -> str:
        """Publish why this rank fails; returns which rank failed first, and why."""
        with suppress(RuntimeError):  # the store's host has ended
            return str(self.store.compare_set(self.key, "", self._named(why)).decode())
        return self._named(why)

    def _look(self) -> None:
        while not self.closed.wait(POLL):
            try:
                if not self.store.check([self.key]):
                    continue
                first = self.store.get(self.key).decode()
            except RuntimeError:  # the store's host has ended
                return
            if not self.closed.wait(LINGER / 2):  # if all fail alike, this rank is about to report it itself
                self._follow(first)

    def _follow(self, first: str) -> None:
        """End this process because another rank has failed; rank 0 prints why."""
        self._end(f"litune: error: {first}" if self.rank == 0 else "", 1)

    def _end(self, line: str, code: int) -> None:
        """Print `line` and end this process at once: at a normal exit the threads of collectives can hang or abort."""
        if not self.leaving.acquire(blocking=False):
            time.sleep(3600)  # another thread is ending the process
        if self.rank > 0:
            time.sleep(2 * LINGER)
        if line:
            print(line, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank == 0:
            time.sleep(LINGER)
        os._exit(code)
