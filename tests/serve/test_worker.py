from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from litune.serve.worker import Busy, Handler, Worker


@contextmanager
def working(handler: Handler, **settings: Any) -> Iterator[Worker]:
    worker = Worker(
        {"square": handler, "other": handler}, **{"batch": 8, "seconds": 0.2, "queue": 100, **settings}
    )  # fmt: skip
    try:
        yield worker
    finally:
        worker.stop()


def test_waiting_jobs_are_done_together() -> None:
    seen: list[list[int]] = []

    def handler(payloads: list[int]) -> list[int]:
        seen.append(payloads)
        return [value**2 for value in payloads]

    async def ask(worker: Worker) -> list[int]:
        return list(await asyncio.gather(*(worker.do("square", i) for i in range(20))))

    with working(handler) as worker:
        assert asyncio.run(ask(worker)) == [i**2 for i in range(20)]
    assert [len(one) for one in seen] == [8, 8, 4]
    assert [value for one in seen for value in one] == list(range(20))


def test_weights_and_kinds() -> None:
    seen: list[list[int]] = []

    def handler(payloads: list[int]) -> list[int]:
        seen.append(payloads)
        return payloads

    async def ask(worker: Worker) -> None:
        jobs = [("square", 1, 5), ("other", 2, 1), ("square", 3, 5), ("square", 4, 3), ("square", 5, 50)]
        await asyncio.gather(*(worker.do(*job) for job in jobs))

    with working(handler) as worker:
        asyncio.run(ask(worker))
    assert seen == [[1, 4], [2], [3], [5]]  # up to a weight of 8; one that is heavier goes alone


def test_a_bad_job_fails_alone() -> None:
    def handler(payloads: list[int]) -> list[float]:
        return [1 / value for value in payloads]

    async def ask(worker: Worker) -> list[Any]:
        return list(await asyncio.gather(*(worker.do("square", i) for i in (1, 0, 2)), return_exceptions=True))

    with working(handler) as worker:
        first, second, third = asyncio.run(ask(worker))
    assert (first, third) == (1.0, 0.5)
    assert isinstance(second, ZeroDivisionError)


def test_a_full_queue_is_refused_and_the_rest_finished_at_the_end() -> None:
    entered, begin = threading.Event(), threading.Event()

    def handler(payloads: list[int]) -> list[int]:
        entered.set()
        begin.wait(10)
        return payloads

    async def ask(worker: Worker) -> list[Any]:
        running = [asyncio.ensure_future(worker.do("square", 0))]
        while not entered.is_set():
            await asyncio.sleep(0.01)
        running += [asyncio.ensure_future(worker.do("square", i)) for i in range(1, 4)]
        await asyncio.sleep(0.01)
        with pytest.raises(Busy):
            await worker.do("square", 4)
        running[1].cancel()
        stopping = threading.Thread(target=worker.stop)
        stopping.start()
        begin.set()
        found = await asyncio.gather(*running, return_exceptions=True)
        stopping.join()
        with pytest.raises(Busy):
            await worker.do("square", 5)
        return list(found)

    with working(handler, batch=1, queue=3, seconds=0.0) as worker:
        found = asyncio.run(ask(worker))
    assert isinstance(found[1], asyncio.CancelledError)
    assert [found[0], *found[2:]] == [0, 2, 3]


def test_a_result_that_nobody_waits_for_ends_nothing() -> None:
    """A server that is closed while the model computes: its loop is gone when the result comes."""
    begun, let_go = threading.Event(), threading.Event()

    def handler(payloads: list[int]) -> list[int]:
        begun.set()
        let_go.wait(10)
        return payloads

    async def give_up(worker: Worker) -> None:
        waiting = asyncio.create_task(worker.do("square", 1))
        await asyncio.to_thread(begun.wait, 10)
        waiting.cancel()

    async def ask(worker: Worker) -> int:
        return int(await asyncio.wait_for(worker.do("square", 3), 10))

    with working(handler, seconds=0) as worker:
        asyncio.run(give_up(worker))
        let_go.set()
        assert asyncio.run(ask(worker)) == 3  # the thread goes on
