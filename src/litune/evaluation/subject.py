"""Who is evaluated, on what and how: a run with its text tower, an evaluation set, and what figures depend on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.evaluation.class_vectors import ClassVectors, TemplateSet
from litune.evaluation.embedded import Embedded, embed_set
from litune.evaluation.task import Task
from litune.model.lit import LiT
from litune.pairs.benchmarks import EvalSet
from litune.pairs.reference import absolute, is_there
from litune.progress import track
from litune.store.store import FeatureStore

TEXTS = 8192  # captions that are encoded at once
CHUNK = 1024  # texts that one rank encodes at a time


@dataclass(frozen=True)
class Protocol:
    """How a run is evaluated: what its figures depend on beside the run and the set."""

    template_set: TemplateSet = "lit"
    templates: tuple[str, ...] = ()
    """Templates of the user's own, instead of a set."""
    canonical: bool = True
    calibration: bool = True
    shots: int = 0
    probes: bool = False
    contamination: bool = True
    by_lang: bool = False
    hub_correction: bool = True
    """Retrieval is also measured with the hub correction, where the run has it on."""
    max_damaged: float = 0.01


@dataclass
class Subject:
    """A run that is evaluated, with what its evaluations share."""

    name: str
    path: Path
    model: LiT
    bfloat16: bool = False
    """Texts are encoded in bfloat16."""
    tuned_on: Sequence[tuple[FeatureStore, np.ndarray]] = ()
    """The stores that it was tuned on and which of their rows, where they are still there."""
    unchecked: str = ""
    """Why it can't be told whether images were tuned on, where that is so."""
    vectors: ClassVectors = field(init=False)

    def __post_init__(self) -> None:
        self.vectors = ClassVectors(self.encode_text)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "N D"]:
        """Features of N texts; each rank encodes whole chunks, so that a text has the company that it has in one."""
        device = self.model.logit_scale.device.type
        precision: AbstractContextManager[Any] = (
            torch.autocast(device, torch.bfloat16) if self.bfloat16 else nullcontext()
        )
        own = distributed.own_part(len(texts), CHUNK)
        parts = [torch.empty(0, self.model.dim)]
        with precision:
            for start in own[::CHUNK]:
                parts.append(self.model.encode_text(texts[start : min(start + CHUNK, own.stop)]).float())
        return distributed.gather_rows(torch.cat(parts))

    def encode_captions(self, captions: list[str]) -> Float[Tensor, "N D"]:
        """Features of N captions; each distinct one is encoded once."""
        distinct = list(dict.fromkeys(captions))
        parts = [torch.empty(0, self.model.dim)]
        with track("encoding", "captions", len(distinct)) as task:
            for start in range(0, len(distinct), TEXTS):
                parts.append(self.encode_text(distinct[start : start + TEXTS]))
                task.advance(len(parts[-1]))
        place = {caption: i for i, caption in enumerate(distinct)}
        return torch.cat(parts)[[place[caption] for caption in captions]]


@dataclass(frozen=True)
class Evaluation:
    """One run on one set under one protocol."""

    task: Task
    images: EvalSet
    subject: Subject
    protocol: Protocol
    features: Path
    """The folder where features of sets are kept."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part of it took."""

    def embed(self, images: EvalSet, name: str) -> Embedded:
        """The features of these images by the run's image tower: those that are kept, or new ones."""
        with self.timed("images"):
            return embed_set(images, name, self.subject.model, self.features, self.protocol.max_damaged)

    def describe(self, embedded: Embedded) -> tuple[list[str], list[str]]:
        """Keys of the embedded images, and references to their pictures where these are still there."""
        pictures = [absolute(self.images.pictures[row]) for row in embedded.rows]
        return [self.images.keys[row] for row in embedded.rows], [path if is_there(path) else "" for path in pictures]

    def facts(self, embedded: Embedded, lang: str = "") -> dict[str, Any]:
        """What the figures depend on: the set, its features, the run's precision and temperature."""
        facts: dict[str, Any] = {
            "set": str(self.images.path),
            "layout": self.images.layout,
            "damaged": embedded.damaged,
            "features": str(embedded.store.path),
            "image_tower": (embedded.store.tower or {}).get("spec", "unknown"),
            "text_precision": "bfloat16" if self.subject.bfloat16 else "float32",
            "temperature": float(self.subject.model.scale.detach()),
        }
        if self.task.subset:
            facts["class_subset"] = self.task.subset
        own = lang or self.task.lang
        if languages := [own] if own else self.images.languages:
            facts["languages"] = languages
        return facts

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Notes how many seconds a `with` takes."""
        began = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - began, 3)
