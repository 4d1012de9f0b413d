"""Runs img2dataset in the Python that has it: `python fetch_worker.py SETTINGS.json` (see litune/curation/fetch.py).

A separate file that imports nothing from litune. img2dataset reads whatever a server sends, for as long as it sends,
and follows redirects to ftp; here answers are limited in bytes and seconds, and only http and https are allowed.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # this file's folder: its inspect.py would stand in for Python's

import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

LIMITS = "LITUNE_FETCH_LIMITS"
"""The environment variable that carries the limits to img2dataset's own processes."""


class Limited:
    """An answer that is read up to the limits."""

    def __init__(self, answer: Any, most_bytes: int, seconds: float) -> None:
        self.headers, self._answer = answer.headers, answer
        self._most, self._until = most_bytes, time.monotonic() + seconds

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()

    def read(self) -> bytes:
        """The whole answer. Raises `ValueError` where it is too large, too slow or cut short."""
        body = bytearray()
        while part := self._answer.read1(1 << 16):
            body += part
            if len(body) > self._most:
                raise ValueError(f"larger than {self._most} bytes")
            if time.monotonic() > self._until:
                raise ValueError("too slow")
        if self._answer.length:
            raise ValueError("ended too early")
        return bytes(body)


def limit_reads() -> None:
    """Apply the limits to every download of this process."""
    limits = json.loads(os.environ[LIMITS])
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())

    def urlopen(request: Any, timeout: float) -> Limited:
        return Limited(opener.open(request, timeout=timeout), limits["most_bytes"], limits["seconds"])

    urllib.request.urlopen = urlopen  # type: ignore[assignment]


def end_with(parent: int) -> None:
    """End this process when its parent is gone: a new run would write the same shards."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ in ("__main__", "__mp_main__"):  # img2dataset's own processes run this file again
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset would load it: half a gigabyte in each process
    limit_reads()

if __name__ == "__main__":
    from img2dataset import download

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    download(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
