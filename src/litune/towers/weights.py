"""Files of weights, before and after they are loaded: whether they are there, and whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from litune.errors import TowerError
from litune.files import LFS_POINTER

MOST_POINTER = 1024
"""The most bytes of a pointer of Git LFS."""


def check_pointers(path: Path) -> None:
    """Raise `TowerError` where a file, or one directly in a folder, is a pointer that Git LFS left in its place."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and file.stat().st_size < MOST_POINTER and file.read_bytes().startswith(LFS_POINTER):
            raise TowerError(
                f"{file} is a pointer of Git LFS, not the file itself: run  git lfs pull  in {file.parent}"
            )


def check_finite(what: str, module: nn.Module) -> None:
    """Raise `TowerError` where a weight of `what` is NaN or infinite."""
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise TowerError(f"{what} has weights that are not finite, in {name!r}: take another copy of it")
