"""What is said of work in progress."""

from __future__ import annotations

import pytest

from litune.progress import Task, track


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_rates_are_of_what_is_done_now(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 100.0, 104.0, 104.0, 104.0, 104.0])
    monkeypatch.setattr("litune.progress.time.monotonic", lambda: next(now))
    with track("reading", "files", 10, 2) as task:
        task.advance(8)
    assert said(capsys) == ["reading: 8 files", "reading: 8 files in 0:04 (2 files/s)"]
    assert task.done == 10


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first one is done nothing is known of the time left."""
    now = iter([100.0, 104.0, 104.0, 104.0, 104.0, 104.0])
    task = Task("reading", "files", 100, 2)
    assert task.line() == "reading 2/100 files"
    monkeypatch.setattr("litune.progress.time.monotonic", lambda: next(now))
    task = Task("reading", "files", 100, 2)
    task.advance(8)
    task.note = "1 damaged"
    assert task.line() == "reading 10/100 files · 2 files/s · 0:45 left · 1 damaged"


def test_everything_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left to do: no rate is made up."""
    with track("reading", "files", 10, 10) as task:
        pass
    assert said(capsys) == ["reading: 10 files, done before"]
    assert task.done == 10
    with track("reading", "files", 0):
        pass
    assert said(capsys) == ["reading: 0 files"]
