"""Which pairs a run's batches are made of, and how many steps it takes."""

from __future__ import annotations

import math

import numpy as np

from litune.config import TuneConfig, parse_mix
from litune.errors import ConfigError, StoreError
from litune.store.selection import Selection
from litune.tuning.batches import Batches, Field


def make_batches(train: Selection, config: TuneConfig, size: int) -> Batches:
    """The batches of a run. Raises `ConfigError` where a store has fewer images than a batch takes of it."""
    sources = [len(one) for one in train.sources]
    mix = parse_mix(config.mix, len(sources)) if len(sources) > 1 else "proportional"
    if mix != "proportional":
        shares = [1.0] * len(sources) if mix == "alternate" else [float(weight / sum(mix)) for weight in mix]
        for one, share in zip(train.sources, shares, strict=True):
            if (wanted := math.ceil(share * size)) > len(one):
                raise ConfigError(
                    f"{one.store.path} has {len(one):,} images to tune on, fewer than the {wanted:,} that a batch "
                    "takes of it: lower --batch-size or its weight in --mix"
                )
    fields = text_fields(train, config.fields)
    return Batches(len(train), fields, size, config.seed, config.shuffle, sources, mix, train.read_ahead)


def text_fields(train: Selection, names: tuple[str, ...]) -> list[Field]:
    """The captions of each of the named text fields; all captions as one field where none is named."""
    if not names:
        return [Field(train.offsets, None)]
    found = []
    for name in names:
        captions = train.of_field(name)
        if not len(captions):
            raise StoreError(f"no image of {train.store.path} that is tuned on has the text field {name!r}")
        found.append(Field(np.searchsorted(captions, train.offsets), captions))
    return found


def default_duration(images: int, captions: int | None = None) -> str:
    """How long to tune where nothing is asked: 10 epochs, at least 30,000 pairs and at most 4 million.

    From a fit to so many `captions` no least number of pairs is needed, and captions count where an image has many: 10
    epochs of the images or 2 of the captions.
    """
    pairs = max(30_000, 10 * images) if captions is None else max(10 * images, 2 * captions)
    return f"{min(4_000_000, pairs)}pairs"


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the held-out pairs are evaluated: spread evenly, the last step among them."""
    return {math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)}
