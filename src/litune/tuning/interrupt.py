"""Ctrl-C while tuning: the step that is being taken is finished and kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from litune import distributed


@contextmanager
def after_the_step() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed, so that a step can be finished and kept; pressed twice, it stops at once.

    Of several processes each is stopped on its own, and in threads there are no signals: there, as ever.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        os.write(2, b"\nfinishing this step; Ctrl-C again stops at once\n")  # print can be what was interrupted

    ours = threading.current_thread() is threading.main_thread() and distributed.world_size() == 1
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
