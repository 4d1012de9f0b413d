"""The log of a run while it goes on: metrics.jsonl, TensorBoard, and the caller's own function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from litune import distributed
from litune.config import TuneConfig
from litune.errors import MissingExtraError
from litune.files import write_text
from litune.model.run_folder import METRICS

OnLog = Callable[[dict[str, Any]], None]


class RunLog:
    """metrics.jsonl, TensorBoard and the caller's function: each gets every line. Rank 0 writes alone."""

    def __init__(self, config: TuneConfig, done: int, on_log: OnLog | None) -> None:
        self.config, self.done, self.on_log = config, done, on_log
        self.board: Any = None

    def __enter__(self) -> RunLog:
        if distributed.is_main():
            self.file = open(self.config.out / METRICS, "a" if self.done else "w", encoding="utf-8")
            if self.config.tensorboard:
                # What was written after step `done` no longer counts.
                self.board = board_writer()(str(self.config.out / "tensorboard"), purge_step=self.done + 1)
        return self

    def write(self, facts: dict[str, Any]) -> None:
        """Log one line."""
        if not distributed.is_main():
            return
        self.file.write(json.dumps(facts) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in _numbers(facts):
                self.board.add_scalar(name, value, facts["step"])
            self.board.flush()  # a rank that fails ends the others as they are
        if self.on_log is not None:
            self.on_log(facts)

    def __exit__(self, *_: object) -> None:
        if distributed.is_main():
            self.file.close()
            if self.board is not None:
                self.board.close()


def board_writer() -> Any:
    """TensorBoard's SummaryWriter. Raises `MissingExtraError` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("--tensorboard", "tensorboard", "tensorboard") from None
    return SummaryWriter


def _numbers(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in nested facts, named by their path."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def drop_lines_after(folder: Path, step: int) -> None:
    """Keep only those lines of a run's metrics.jsonl that were logged up to this step."""
    file = folder / METRICS
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [line for line in lines if _logged_step(line) <= step]
    write_text(file, "".join(line + "\n" for line in kept))


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 1 << 62  # a line that a kill cut short
