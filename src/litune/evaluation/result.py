"""The outcome of one evaluation: its figures, and the outcome of each example that they are computed from."""

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
    """The figures' definition, in words."""
    images: int
    protocol: dict[str, Any]
    """Template set, number of templates, canonicalised, languages, class subset, set path, fingerprint, …"""
    outcomes: dict[str, np.ndarray]
    """Name in `values` → outcome of each example [N] (0 or 1), whose mean is the figure (for mean_per_class, the mean
    of the classes' means)."""
    groups: dict[str, np.ndarray]
    """Name → the resampling unit of each example [N] (its class for mean_per_class, the image of each caption for
    text_to_image); where absent, each example is its own unit."""
    keys: list[str]
    """Per image [B]."""
    pictures: list[str]
    """Per image [B]: the path of its file, "" where there is none."""
    hashes: list[str]
    """Per image [B]: sha256 of its file, "" where unknown."""
    class_names: list[str] = field(default_factory=list)
    """The class names [C] of a classification, as shown to people."""
    labels: np.ndarray | None = None
    """Each image's own class [B], in a classification."""
    predicted: np.ndarray | None = None
    """The predicted classes [B], in a classification."""
    confidence: np.ndarray | None = None
    """The softmax probability [B] of the predicted class at the model's temperature, in a classification."""
    captions: list[str] = field(default_factory=list)
    """The captions [N] of a retrieval."""
    owner: np.ndarray | None = None
    """The image of each caption [N], in a retrieval."""
    best_images: np.ndarray | None = None
    """The highest-scoring images of each caption [N, 5], best first, in a retrieval."""
    lang: str = ""
    """The language of this row of a per-language table, or ""."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Calibration, probes, contamination, seconds, …: plain JSON values."""
