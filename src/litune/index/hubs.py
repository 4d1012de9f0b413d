"""The hub correction of every image of a store under a run: computed once, and kept beside the features.

    STORE/hubs/FINGERPRINT.npy    −r / 2 of each image (see litune.model.hubs), float32

The fingerprint is of the store, of what maps its features, and of the run's bank.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float

from litune.files import atomic
from litune.index.cells import blocks
from litune.model import hubs
from litune.model.hubs import Bank
from litune.model.lit import LiT
from litune.progress import say, track
from litune.store.store import FeatureStore

FOLDER = "hubs"


def image_corrections(store: FeatureStore, model: LiT, bank: Bank, image_side: str) -> Float[np.ndarray, " rows"]:
    """−r / 2 of every image of the store; `image_side` is the fingerprint of what maps its features."""
    facts = json.dumps([store.manifest, len(store), image_side, bank.digest], sort_keys=True, default=str)
    file = store.path / FOLDER / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.npy"
    if (kept := _read(file, len(store))) is not None:
        return kept
    corrections = np.empty(len(store), np.float32)
    with track("looking for hubs, once", "images", len(store)) as task:
        for rows in blocks(np.arange(len(store))):
            features = model.map_features(store.features(rows))
            corrections[rows] = hubs.corrections(features, bank.texts).cpu().numpy()
            task.advance(len(rows))
    try:
        with atomic(file) as temporary, open(temporary, "wb") as out:
            np.save(out, corrections)
    except OSError as why:
        say(f"{file} can't be written ({why.strerror or why}): hubs are looked for anew in each search")
    return corrections


def _read(file: Path, rows: int) -> np.ndarray | None:
    """What was kept; None where there is nothing, or a file that is no such array."""
    try:
        corrections: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return corrections if corrections.shape == (rows,) and corrections.dtype == np.float32 else None
