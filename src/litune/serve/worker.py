"""One thread that owns the model and batches waiting requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Handler = Callable[[list[Any]], Sequence[Any]]
"""Maps payloads of one kind to their results, in order."""


class Busy(Exception):  # noqa: N818
    """The queue is full."""


@dataclass
class _Job:
    kind: str
    payload: Any
    weight: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    born: float = field(default_factory=time.monotonic)

    def settle(self, result: Any, error: BaseException | None = None) -> None:
        """Hand the outcome to the event loop, which may be closed by now, and whose client may be gone."""

        def tell() -> None:
            if not self.future.done():
                if error is None:
                    self.future.set_result(result)
                else:
                    self.future.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(tell)


class Worker:
    """Runs jobs of several kinds in one thread; waiting jobs of the same kind run together, up to the weight `batch`.

    A job whose batch is not full waits `seconds` for others. With a thread per request, threads would compete for the
    cores; and a batch of 32 texts takes a fraction of the time of 32 single ones.
    """

    def __init__(
        self,
        handlers: dict[str, Handler],
        *,
        batch: int,
        seconds: float,
        queue: int,
        on_batch: Callable[[str, int], None] = lambda kind, weight: None,
    ) -> None:
        self.handlers, self.batch, self.seconds, self.queue, self.on_batch = handlers, batch, seconds, queue, on_batch
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def waiting(self) -> int:
        """The number of waiting jobs."""
        return len(self._jobs)

    async def do(self, kind: str, payload: Any, weight: int = 1) -> Any:
        """The result of a job. Raises `Busy` where too many are waiting, and what the handler raises."""
        loop = asyncio.get_running_loop()
        job = _Job(kind, payload, weight, loop, loop.create_future())
        with self._changed:
            if len(self._jobs) >= self.queue or self._stopping:
                raise Busy
            self._jobs.append(job)
            self._changed.notify()
        return await job.future

    def stop(self) -> None:
        """Finish the waiting jobs, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._take():
            self.on_batch(jobs[0].kind, sum(job.weight for job in jobs))
            self._handle(jobs)

    def _take(self) -> list[_Job]:
        """The oldest job and those of its kind that fit into its batch; empty at the end."""
        with self._changed:
            while not self._jobs and not self._stopping:
                self._changed.wait()
            if not self._jobs:
                return []
            kind, due = self._jobs[0].kind, self._jobs[0].born + self.seconds
            while not self._stopping and self._weight(kind) < self.batch and (left := due - time.monotonic()) > 0:
                self._changed.wait(left)
            taken: list[_Job] = []
            room, rest = self.batch, deque[_Job]()
            for job in self._jobs:
                if job.future.cancelled():
                    continue  # the client is gone
                if job.kind == kind and (job.weight <= room or not taken):
                    taken.append(job)
                    room -= job.weight
                else:
                    rest.append(job)
            self._jobs = rest
            return taken if taken else self._take()

    def _weight(self, kind: str) -> int:
        return sum(job.weight for job in self._jobs if job.kind == kind)

    def _handle(self, jobs: list[_Job]) -> None:
        try:
            results = self.handlers[jobs[0].kind]([job.payload for job in jobs])
        except Exception as why:
            if len(jobs) == 1:
                jobs[0].settle(None, why)
            else:  # one bad job must not fail the others
                for job in jobs:
                    self._handle([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.settle(result)
