"""Progress with rate and remaining time: a live bar on a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

LINE_SECONDS = 10.0


def console() -> Console:
    """The console for messages: standard error, so that results on standard output stay clean."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print one message for the user; of several processes, only rank 0 prints."""
    if not _silent():
        console().print(message, markup=False)


def _silent() -> bool:
    return os.environ.get("RANK", "0") != "0"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> duration(75.2)
    '1:15'
    """
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class Task:
    """Work in progress: `advance` as it is done; `note` holds a few words shown beside it."""

    def __init__(self, what: str, unit: str, total: int, done: int) -> None:
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self.note = ""
        self._began, self._at_start = time.monotonic(), done

    def advance(self, count: int) -> None:
        """Count `count` more units as done."""
        self.done += count

    @property
    def seconds(self) -> float:
        """Seconds since this task began."""
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Units a second since this task began."""
        return (self.done - self._at_start) / max(self.seconds, 1e-9)

    def line(self) -> str:
        """The state as one line of text."""
        done, note = f"{self.what} {self.done:,}/{self.total:,} {self.unit}", f" · {self.note}" if self.note else ""
        if not self.rate:
            return done + note
        left = duration((self.total - self.done) / self.rate)
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        return f"{done} · {rate} {self.unit}/s · {left} left{note}"


class _Lines(Task):
    def __init__(self, what: str, unit: str, total: int, done: int) -> None:
        super().__init__(what, unit, total, done)
        self._said = time.monotonic()

    def advance(self, count: int) -> None:
        super().advance(count)
        if time.monotonic() - self._said >= LINE_SECONDS and self.done < self.total:
            say(self.line())
            self._said = time.monotonic()


class _Bar(Task):
    def __init__(self, what: str, unit: str, total: int, done: int, bars: Progress) -> None:
        super().__init__(what, unit, total, done)
        self._bars = bars
        self._id = bars.add_task(what, total=total, completed=done, state=self)

    def advance(self, count: int) -> None:
        super().advance(count)
        self._bars.update(self._id, completed=self.done)


class _RateAndNote(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        state: Task = task.fields["state"]
        rate = f"{state.rate:,.0f}" if state.rate >= 10 else f"{state.rate:.2g}"
        return Text(f"{rate} {state.unit}/s" + (f" · {state.note}" if state.note else ""))


@contextmanager
def track(what: str, unit: str, total: int, done: int = 0) -> Iterator[Task]:
    """Track `total` units of work, of which `done` were done before, and say at the end how long the others took."""
    task: Task
    if total == done:
        say(f"{what}: {total:,} {unit}" + (", done before" if total else ""))
        yield Task(what, unit, total, done)
    elif sys.stderr.isatty() and not _silent():
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateAndNote(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console(),
        )
        with bars:
            task = _Bar(what, unit, total, done, bars)
            yield task
    else:
        say(f"{what}: {total - done:,} {unit}")
        task = _Lines(what, unit, total, done)
        yield task
        say(f"{what}: {task.done - done:,} {unit} in {duration(task.seconds)} ({task.rate:,.0f} {unit}/s)")
