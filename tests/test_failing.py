"""Two processes of which one fails: both end at once, without torchrun to end them, and rank 0 says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.forked import quick_python
from tests.test_distributed import NAMES, free_port

SCRIPT = """
import sys, time
import torch
from litune import cli, distributed

from litune.errors import DataError

def fail():
    if case == "memory":
        raise torch.OutOfMemoryError("out of memory")
    if case == "disk":
        raise DataError("the disk is away")
    print("ready", flush=True)  # to be interrupted
    time.sleep(600)

def work(config):
    distributed.start("cpu")
    torch.set_num_threads(1)
    total = torch.ones(3)
    if case == "main":
        distributed.from_main(lambda: {}["missing"])
    for step in range(10**9):
        if step == 5 and distributed.rank() == 1:
            fail()
        if step == 5 and where == "asleep":
            time.sleep(600)
        distributed.sum_([total])

case, where, how = sys.argv[1:]
if how == "python":
    work(None)
else:
    cli.find_command = lambda config: type("Command", (), {"run": staticmethod(work)})
    cli.main(["eval", "run", "--store", "store"])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def two_ranks(script: Path, *args: str) -> list[subprocess.Popen[str]]:
    values = ("2", "127.0.0.1", str(free_port()))
    places = [dict(zip(NAMES, (str(r), values[0], str(r), *values[1:]), strict=True)) for r in range(2)]
    common = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command, pipe = [quick_python(), "-W", "error", script, *args], subprocess.PIPE
    return [subprocess.Popen(command, env=common | one, text=True, stdout=pipe, stderr=pipe) for one in places]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and standard error of each."""
    try:
        return [(process.returncode, said) for process in processes for _, said in [process.communicate(timeout=60)]]
    finally:
        for process in processes:
            process.kill()


def test_memory_that_ends_on_one_rank_is_one_line(script: Path) -> None:
    (main, said), (other, told) = ends(two_ranks(script, "memory", "asleep", "command line"))
    assert (main, other) == (1, 2)
    assert said == told
    assert said.startswith("litune: error: rank 1: the GPU's memory is too small for this model")


@pytest.mark.parametrize("where", ["in a collective", "asleep"])
def test_an_exception_on_one_rank_ends_both(script: Path, where: str) -> None:
    (main, said), (other, trace) = ends(two_ranks(script, "memory", where, "python"))
    assert (main, other) == (1, 1)
    assert said == "litune: error: rank 1: OutOfMemoryError: out of memory\n"
    assert trace.startswith("[rank1]: Traceback")
    assert trace.endswith("OutOfMemoryError: out of memory\n")


def test_an_error_on_one_rank_ends_both(script: Path) -> None:
    (main, said), (other, told) = ends(two_ranks(script, "disk", "in a collective", "command line"))
    assert (main, other) == (1, 2)
    assert said == told == "litune: error: rank 1: the disk is away\n"


def test_what_rank_0_meets_alone_ends_both(script: Path) -> None:
    (main, said), (other, nothing) = ends(two_ranks(script, "main", "in a collective", "python"))
    assert (main, other) == (1, 1)
    assert said.startswith("[rank0]: Traceback")
    assert said.endswith("KeyError: 'missing'\n")
    assert not nothing


def test_ctrl_c_on_one_rank_ends_both(script: Path) -> None:
    processes = two_ranks(script, "wait", "in a collective", "command line")
    assert processes[1].stdout is not None
    assert processes[1].stdout.readline() == "ready\n"
    began = time.monotonic()
    processes[1].send_signal(signal.SIGINT)
    (main, said), (other, nothing) = ends(processes)
    assert time.monotonic() - began < 30
    assert (main, other) == (1, 130)
    assert said == "litune: error: rank 1: interrupted\n"
    assert not nothing
