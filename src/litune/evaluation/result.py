"""The outcome of one evaluation: figures, and example by example what they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Result:
    """Figures of one task, as shares of one, beside chance, with the outcome of every example."""

    task: str
    """Its name in the registry, or the user's."""
    kind: Literal["classification", "retrieval"]
    metric: str
    """The headline figure, a key of `values`."""
    values: dict[str, float]
    """All figures: "accuracy", "mean_per_class", "top5", "text_to_image recall@1", "image_to_text recall@5", …"""
    chance: dict[str, float]
    """What a random guess would reach, for those of the same keys that have one."""
    definition: str
    """Of the figures, in words."""
    images: int
    protocol: dict[str, Any]
    """Template set, number of templates, canonicalised, languages, class subset, set path, fingerprint, …"""
    outcomes: dict[str, np.ndarray]
    """Name in `values` → outcome of each example [N] (0 or 1), whose mean is the figure (for mean_per_class, the mean
    of the classes' means)."""
    groups: dict[str, np.ndarray]
    """Name → the resampling unit of each example [N] (its class for mean_per_class, the image of each caption for
    text_to_image); where absent, each is its own."""
    keys: list[str]
    """Per image [B]."""
    pictures: list[str]
    """Per image [B]: the path of its file, "" where there is none."""
    hashes: list[str]
    """Per image [B]: sha256 of its file, "" where unknown."""
    class_names: list[str]
    """Of a classification [C], as shown to people."""
    labels: np.ndarray | None
    """Of a classification [B], each image's own class."""
    predicted: np.ndarray | None
    """Of a classification [B]."""
    confidence: np.ndarray | None
    """Of a classification [B], the softmax probability of the predicted class at the model's temperature."""
    captions: list[str]
    """Of a retrieval [N]."""
    owner: np.ndarray | None
    """Of a retrieval [N], the image of each caption."""
    found: np.ndarray | None
    """Of a retrieval [N, 5], the best images of each caption, best first."""
    lang: str = ""
    """The language of this row of a per-language table, or ""."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Calibration, probes, contamination, seconds, …: plain JSON values."""
