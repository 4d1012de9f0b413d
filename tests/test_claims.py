from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from litune import claims
from litune.claims import claim
from litune.errors import OutputBusyError

TIMES = {"BEAT": 0.1, "STALE": 1.5, "SETTLE": 0.2, "POLL": 0.05}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, seconds in TIMES.items():
        monkeypatch.setattr(claims, name, seconds)


def _claim_and_wait(folder: Path, cache: Path, there: Connection) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    for name, seconds in TIMES.items():
        setattr(claims, name, seconds)
    with claim(folder):
        there.send("claimed")
        there.recv()
    there.send("let go")


Started = tuple[Any, Connection]


@pytest.fixture
def claiming() -> Iterator[Callable[[Path, Path], Started]]:
    """A process that has claimed a folder, on the host whose cache is named; it lets go when it is sent something."""
    started = []

    def start(folder: Path, cache: Path) -> Started:
        here, there = multiprocessing.Pipe()
        other = multiprocessing.get_context("spawn").Process(target=_claim_and_wait, args=(folder, cache, there))
        other.start()
        started.append(other)
        assert here.recv() == "claimed"
        return other, here

    yield start
    for other in started:
        other.kill()
        other.join()


def test_a_folder_is_claimed_until_its_process_ends_or_is_killed(
    tmp_path: Path, claiming: Callable[[Path, Path], Started]
) -> None:
    other, _ = claiming(tmp_path / "out", tmp_path / "cache")
    message = rf"out is being written by process {other.pid} on {claims.socket.gethostname()}: wait"
    with pytest.raises(OutputBusyError, match=message), claim(tmp_path / "out"):
        pass
    with claim(tmp_path / "another"):
        pass
    other.kill()
    other.join()
    for _ in range(2):  # and whoever lets go leaves nothing behind
        began = time.monotonic()
        with claim(tmp_path / "out"):
            assert time.monotonic() - began < TIMES["STALE"] / 2  # at once
            assert sorted(path.name for path in tmp_path.iterdir()) == [".out.claim", "cache"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_another_host_is_seen_while_it_works_and_taken_over_when_it_is_gone(
    tmp_path: Path, claiming: Callable[[Path, Path], Started], capfd: pytest.CaptureFixture[str]
) -> None:
    other, pipe = claiming(tmp_path / "out", tmp_path / "another-cache")
    for _ in range(2):
        with pytest.raises(OutputBusyError, match=f"written by process {other.pid} on "), claim(tmp_path / "out"):
            pass
    pipe.send("let go")
    assert pipe.recv() == "let go"
    with claim(tmp_path / "out"):
        pass
    capfd.readouterr()

    other, _ = claiming(tmp_path / "out", tmp_path / "another-cache")
    os.utime(tmp_path / ".out.claim", (2**32, 2**32))  # its clock is another
    other.kill()
    other.join()
    began = time.monotonic()
    with claim(tmp_path / "out"):
        assert time.monotonic() - began > TIMES["STALE"]
        time.sleep(3 * TIMES["BEAT"])
    assert f"is claimed by process {other.pid} on " in capfd.readouterr().err
    assert not (tmp_path / ".out.claim").exists()


def test_who_was_taken_over_while_asleep_is_interrupted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "out"):
        (tmp_path / ".out.claim").write_text('{"name": "there", "process": 7}')
        for _ in range(1000):
            time.sleep(0.01)
    assert "was taken over by process 7 on there: stopping" in capfd.readouterr().err
    assert "there" in (tmp_path / ".out.claim").read_text()  # it is the other's


def test_of_two_that_take_over_at_once_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".out.claim"
    file.write_text("half of a")
    write = claims._write

    def and_another(path: Path, own: str) -> None:
        write(path, own)
        write(path, '{"name": "there", "process": 7}')

    monkeypatch.setattr(claims, "_write", and_another)
    with pytest.raises(OutputBusyError, match="by process 7 on there"), claim(tmp_path / "out"):
        pass


def test_without_locks_or_a_place_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with claim(tmp_path / "file" / "out"):  # what is wrong with it is said by whoever writes
        pass
    monkeypatch.setattr(claims, "fcntl", None)
    with claim(tmp_path / "out"), pytest.raises(OutputBusyError), claim(tmp_path / "out"):
        pass
    with claim(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "file"]
