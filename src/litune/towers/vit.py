"""Sizes of the Vision Transformer (Scaling Vision Transformers, arXiv 2106.04560), for images and for texts."""

from __future__ import annotations

import re

from litune.errors import TowerError

VIT_SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
}
"""Width, depth, width of the MLP, heads."""


def vit_size(name: str) -> tuple[int, int, int, int]:
    """Width, depth, MLP width and heads of a size by name (Ti, S, B, L, H, g) or spelled out, as in 64-2-128-4.

    Raises `TowerError` for any other name.

    >>> vit_size("Ti"), vit_size("64-2-128-4")
    ((192, 12, 768, 3), (64, 2, 128, 4))
    """
    if name in VIT_SIZES:
        return VIT_SIZES[name]
    numbers = re.fullmatch(r"(\d+)-(\d+)-(\d+)-(\d+)", name)
    if numbers is None:
        raise TowerError(f"unknown size {name!r}: known: {', '.join(VIT_SIZES)}, or WIDTH-DEPTH-MLP-HEADS")
    width, depth, mlp, heads = (int(n) for n in numbers.groups())
    if not (width and depth and mlp and heads) or width % heads:
        raise TowerError(f"in the size {name!r} the width must be a multiple of the heads, and all of them positive")
    return width, depth, mlp, heads


def check_vit_size(spec: str, name: str) -> None:
    """Raise `TowerError`, which names the tower's spec, for an unknown size."""
    try:
        vit_size(name)
    except TowerError as why:
        raise TowerError(f"{spec!r} can't be: {why}") from None


def vit_name(width: int, depth: int, mlp: int, heads: int) -> str:
    """The name of a size, the inverse of `vit_size`."""
    named = {size: name for name, size in VIT_SIZES.items()}
    return named.get((width, depth, mlp, heads), f"{width}-{depth}-{mlp}-{heads}")
