"""Some pairs, drawn and embedded with each of several features of one tower, before anything large is embedded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from litune.config import EmbedConfig, ProbeConfig
from litune.errors import ConfigError
from litune.pairs.pairs import Pairs, read_pairs
from litune.progress import say
from litune.store.embed import embed_pairs
from litune.store.store import MANIFEST, FeatureStore


def embed_samples(config: ProbeConfig, folder: Path) -> list[Path]:
    """Embed the sample with each of the features into a store in `folder`; returns the stores.

    Raises `ConfigError` where no image tower is known, and what embedding does.
    """
    (address,) = config.stores
    spec = config.image_tower or _own_tower(Path(address))
    pairs = draw(config, read_pairs(address, lang=config.lang))
    say(f"embedding {len(pairs):,} images with {', '.join(config.features)} of {spec}")
    runtime: dict[str, str] = {}  # chosen for the first of them
    stores = []
    for number, features in enumerate(config.features):
        out = folder / str(number)
        settings = EmbedConfig(
            address,
            spec,
            out,
            features=features,
            device=config.device,
            **runtime,  # type: ignore[arg-type]
        )
        made = embed_pairs(settings, pairs).tower or {}
        runtime = {name: made[name] for name in ("runtime", "precision")}
        stores.append(out)
    return stores


def _own_tower(path: Path) -> str:
    """The image tower of a feature store."""
    tower = FeatureStore(path).tower if (path / MANIFEST).exists() else None
    if not tower or "spec" not in tower:
        raise ConfigError(f"{path} does not know its image tower: name the one to try with --image-tower")
    return str(tower["spec"])


def draw(config: ProbeConfig, pairs: Pairs) -> Pairs:
    """The images to learn from and those to measure on, drawn by the seed, in the order of the pairs."""
    train, val = config.images
    splits = pairs.table["split"].to_pylist() if "split" in pairs.table.column_names else [config.split] * len(pairs)
    wanted = {config.split: train, config.val_split: val} if config.val_split in splits else {config.split: train + val}
    random = np.random.default_rng(config.seed)

    def rows() -> Iterator[np.ndarray]:
        for split, most in wanted.items():
            there = np.flatnonzero(np.array(splits) == split)
            yield random.permutation(there)[:most]

    return dataclasses.replace(pairs, table=pairs.table.take(np.sort(np.concatenate(list(rows())))), damaged=())
