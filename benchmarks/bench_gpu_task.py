"""What gpu_check.py gives to its parts: how large everything is, and where their figures go. Imports nothing large."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A BERT's layers, width, width of its MLP, and heads."""

    layers: int
    width: int
    mlp: int
    heads: int


@dataclass(frozen=True)
class Sizes:
    """How large everything is: by default, what suits a card like an H100."""

    bert: Shape = Shape(12, 768, 3072, 12)
    minilm: Shape = Shape(6, 384, 1536, 12)
    vocabulary: int = 30522
    vit_l: str = "timm:vit_large_patch14_224?init=random"
    vit_b: str = "timm:vit_base_patch16_224?init=random"
    dim: int = 768
    run_steps: int = 24
    pairs: int = 65536
    steps: dict[int, int] = field(default_factory=lambda: {16384: 12, 65536: 3})
    """Measured steps by batch size."""
    square: int = 8192
    compiled: bool = True
    """Whether image towers may be compiled, which takes long."""
    ready: int = 256
    pictures: int = 2048
    images: int = 1_000_000
    queries: int = 256
    peer_tower: str = "vit_base_patch16_224"
    peer_batch: int = 1024
    peer_steps: int = 10


SMALL = Sizes(
    bert=Shape(2, 64, 128, 4),
    minilm=Shape(1, 64, 128, 4),
    vocabulary=1000,
    vit_l="timm:test_vit.r160_in1k?init=random&size=64",
    vit_b="timm:test_vit2.r160_in1k?init=random&size=64",
    dim=64,
    run_steps=6,
    pairs=256,
    steps={32: 3, 64: 2},
    square=128,
    compiled=False,
    ready=4,
    pictures=16,
    images=2000,
    queries=8,
    peer_tower="vit_tiny_patch16_224",
    peer_batch=2,
    peer_steps=2,
)
"""For a processor, and to see that everything runs."""


class SkippedError(Exception):
    """Why a part can't be run here."""


@dataclass
class Task:
    """What a part works with. Its figures go to a file as they come, so that a crash leaves those before it."""

    sizes: Sizes
    device: str
    folder: Path
    start: str = "spawn"
    """How further processes are started, as multiprocessing names it."""
    wrong: list[str] = field(default_factory=list)

    def add(self, **figures: Any) -> None:
        """Keep some figures."""
        with open(self.folder / "figures.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def check(self, name: str, value: float, limit: float) -> None:
        """Keep a figure that is wrong where it is above `limit`, or not a number."""
        self.add(**{name: value})
        if not value <= limit:
            self.wrong.append(f"{name} is {value:.2g}, at most {limit:.2g} is right")

    def require(self, name: str, value: bool) -> None:
        """Keep what has to be true."""
        self.add(**{name: value})
        if not value:
            self.wrong.append(f"{name} is false")

    def figures(self) -> dict[str, Any]:
        """All that was kept."""
        file = self.folder / "figures.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {name: value for line in lines for name, value in json.loads(line).items()}


def peak_memory(device: str) -> dict[str, float]:
    """The most memory that was in use so far, in 10⁹ bytes."""
    if device == "cuda":
        import torch

        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_allocated_gb": allocated / 1e9, "peak_reserved_gb": reserved / 1e9}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gb": peak * (1 if sys.platform == "darwin" else 1024) / 1e9}
