"""The bank by which a run tells hubs, and whether its correction gains anything on the held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from litune.evaluation.retrieval import retrieval
from litune.model.hubs import Bank
from litune.model.run_folder import save_bank
from litune.progress import say
from litune.store.selection import Selection
from litune.tuning.held_out import held_out_part

if TYPE_CHECKING:
    from litune.tuning.run import Tuning

LEAST, MOST = 1000, 10_000
"""Captions of a bank: fewer gain nothing, more little."""
SHARE = 0.1
"""Above `LEAST`, a bank has at most this share of the pairs seen: encoding it takes little of a run's time."""
WAYS = {"T→I": "text_to_image", "I→T": "image_to_text"}

Pairs = tuple[Float[Tensor, "B D"], Float[Tensor, "N D"], Int[Tensor, " N"]]
"""Features of images and of texts, and the image of each text."""


def draw(train: Selection, most: int, seed: int) -> tuple[Selection, Int[np.ndarray, " n"]] | None:
    """Images drawn by the seed and the numbers of their distinct captions, `most` of each; None of too few."""
    generator = np.random.default_rng([seed, 2])
    images = train.subset(np.sort(generator.choice(len(train), min(most, len(train)), replace=False)))
    captions: Any = images.caption_array.dictionary_encode()
    _, first = np.unique(captions.indices.to_numpy(), return_index=True)
    if min(most, len(first)) < LEAST:
        return None
    return images, np.sort(generator.permutation(first)[:most])


def keep_bank(folder: Path, bank: Bank, held_out: Pairs) -> dict[str, Any]:
    """Write the bank; returns what the manifest says: whether the correction is on, and the recalls with and without.

    It is on where the mean of recall@1, 5 and 10 gains in both directions.
    """
    save_bank(folder, bank)
    images, texts, owner = held_out
    recalls = {
        "bare": retrieval(images, texts, owner),
        "corrected": retrieval(*bank.corrected(images, texts), owner),
    }
    means = {
        way: [float(np.mean(list(figures[way].values()))) for figures in recalls.values()] for way in WAYS.values()
    }
    on = all(corrected > bare for bare, corrected in means.values())
    changes = (f"{name} {means[way][0]:.1%} → {means[way][1]:.1%}" for name, way in WAYS.items())
    say(f"hub correction {'on' if on else 'off'}: mean held-out recall@1, 5, 10 {', '.join(changes)}")
    return {
        "hub_correction": {
            "on": on,
            "bank": {"captions": len(bank.texts), "images": len(bank.images)},
            "held_out": {name: {way: figures[way] for way in WAYS.values()} for name, figures in recalls.items()},
        }
    }


def tuned_bank(run: Tuning) -> dict[str, Any]:
    """`keep_bank` of a run of tuning that has taken its last step; nothing where there is too little to decide on."""
    seen = run.progress.step * run.size
    drawn = draw(run.train, min(MOST, max(LEAST, int(SHARE * seen))), run.config.seed) if run.val else None
    if drawn is None:
        return {}
    assert run.val is not None
    images, numbers = drawn
    held_out, val = run.held_out(), run.val
    texts = held_out.texts(images.take_captions(numbers).to_pylist())
    of_val = held_out.texts(held_out_part(val).captions) if run.val_texts is None else run.val_texts

    def decide() -> dict[str, Any]:
        bank = Bank.of(texts, held_out.images(images)[0])
        return keep_bank(run.config.out, bank, held_out.pairs(val, of_val))

    return held_out.on_main(decide)
