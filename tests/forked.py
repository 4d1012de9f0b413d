"""A Python that starts at once: forked from one that has imported torch and litune, which takes seconds.

It is used as `sys.executable` is, with subprocess: a process of its own, with its own folder, environment, standard
files, signals and exit code. What is to be imported anew (what `--help` imports, warnings of imports, variables that
libraries read when they are imported) is for `sys.executable`.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="litune-forked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "running").mkdir()
    return folder


def wait_until_gone() -> None:
    """Wait for what kill -9 has ended: it is the program of a process a moment later, or not even begun."""
    subprocess.run([quick_python(), "-c", ""], check=True)  # begun after all that were asked for before
    while any((_folder() / "running").iterdir()):
        time.sleep(0.01)


@cache
def quick_python() -> str:
    """The path of a Python to start processes with; the one that they are forked from ends with this process."""
    if sys.platform != "linux":
        return sys.executable
    folder = _folder()
    command = [sys.executable, str(HERE / "forked_server.py"), str(folder / "socket")]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a thread would be lost in a fork
    server = subprocess.Popen(
        command, env=os.environ | one_thread, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    client = [sys.executable, "-I", "-S", str(HERE / "forked_client.py"), str(folder / "socket")]
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    python.chmod(0o755)
    return str(python)
