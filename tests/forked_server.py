"""Forks a Python that has imported what litune imports: `python forked_server.py SOCKET` (see tests/forked.py).

Each connection is a request of forked_client.py: arguments, folder and environment of a Python, with its three standard
files. A keeper of each program tells the client its process and how it ends, and ends it when the client is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image

MODULES = (
    "torch.distributed.launcher.api",
    "transformers.models.bert.modeling_bert",
    "litune.cli",
    "litune.evaluation.evaluate",
    "litune.index.search",
    "litune.store.embed",
    "litune.tuning.tune",
)


def read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and its standard files; EOFError where the client is gone before it has said all."""
    length, files, *_ = socket.recv_fds(connection, 8, 3)
    left, parts = int.from_bytes(length, "big"), []
    while left or not length:
        parts.append(connection.recv(left))
        if not parts[-1]:
            raise EOFError
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), files


def descendants(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [member for child in map(int, children) for member in (child, *descendants(child))]


def keep(connection: socket.socket, program: int, running: Path) -> None:
    """Tell the client of a program, and wait for the end of either; `running` is there as long as the program."""
    with contextlib.suppress(OSError):  # the client may be gone already, which `select` sees
        connection.sendall(f"{program}\n".encode())
    ended = os.pidfd_open(program)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        for process in (program, *descendants(program)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    running.unlink()
    with contextlib.suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def prepare(request: dict[str, Any], files: list[int], base: list[str]) -> Callable[[], Any]:
    """Make this process that of the request; returns what it is to do."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = list(request["arguments"])
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            warnings.simplefilter(arguments.pop(0))  # type: ignore[arg-type]
    kind = arguments.pop(0) if arguments[0] in ("-c", "-m") else "script"
    what = arguments[0]
    sys.argv = [kind, *arguments[1:]] if kind == "-c" else arguments
    first = {"-c": "", "-m": str(Path.cwd())}.get(kind, str(Path(what).parent.absolute()))
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *base]
    importlib.invalidate_caches()
    if kind == "-c":
        return lambda: exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    if kind == "-m":
        return lambda: runpy.run_module(what, run_name="__main__", alter_sys=True)
    return lambda: runpy.run_path(what, run_name="__main__")


def serve(address: str) -> Callable[[], Any]:
    """Start programs for ever; returns in each of them, with what it is to do."""
    own = {part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part}
    base = [part for part in sys.path[1:] if part not in own]
    for name in MODULES:
        importlib.import_module(name)
    Image.init()  # all formats
    pyarrow.table({"text": ["x"]}).to_pylist()  # imports pandas, where that is installed
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers
    numbers = itertools.count()
    while True:
        connection, _ = listener.accept()
        running = Path(address).with_name("running") / str(next(numbers))
        running.touch()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        try:
            request, files = read(connection)
        except (EOFError, OSError):
            running.unlink()
            os._exit(0)
        if program := os.fork():
            for file in files:
                os.close(file)
            keep(connection, program, running)
        connection.close()
        sys.executable = str(Path(address).with_name("python"))  # what it starts is forked as well
        return prepare(request, files, base)


def finish(program: Callable[[], Any]) -> None:
    """Run a program and end as Python ends, but for taking its memory apart, which would copy all of it first."""
    code = 0
    try:
        program()
    except SystemExit as why:
        code = why.code if isinstance(why.code, int) else int(why.code is not None)
        if not isinstance(why.code, int | None):
            print(why.code, file=sys.stderr)
    except BaseException as why:
        sys.excepthook(type(why), why, why.__traceback__)
        code = -signal.SIGINT if isinstance(why, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    finish(serve(sys.argv[1]))
