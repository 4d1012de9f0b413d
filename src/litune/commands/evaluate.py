"""Run → numbers: retrieval on a store's pairs, zero-shot classification on class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litune import distributed
from litune.checkpoint import check_store, load
from litune.config import EvalConfig, command
from litune.data.names import canonicalize
from litune.data.pairs import class_folders
from litune.encoding import encode_images, pick_runtime
from litune.errors import DataError
from litune.evaluation import retrieval as retrieval_metrics
from litune.evaluation import zero_shot as zero_shot_metrics
from litune.features import MANIFEST, FeatureStore, library_versions
from litune.files import write_json
from litune.model import LiT
from litune.progress import say, track
from litune.towers.image import differences

CHUNK = 2048  # captions that one rank encodes at a time
BATCH = 32  # images


@command(EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a run; returns (and writes to `config.json`) every figure, each metric's definition, and chance.

    Under torchrun every process calls it alike and encodes its part; rank 0 measures and writes. Raises
    `RunError`, `StoreError` or `DataError` for what can't be read.
    """
    distributed.start(config.device)
    model = load(config.run, image_tower=config.image_tower, device=config.device)
    results: dict[str, Any] = {"run": str(config.run)}
    if config.store is not None:
        results["retrieval"] = evaluate_retrieval(model, config, FeatureStore(config.store))
    if config.classes is not None:
        results["zero_shot"] = evaluate_classes(model, config, config.classes)
    results["libraries"] = library_versions()
    if config.json is not None and distributed.is_main():
        write_json(config.json, results)
    return results


def evaluate_retrieval(model: LiT, config: EvalConfig, store: FeatureStore) -> dict[str, Any]:
    """Recall@k both ways on the pairs of a store."""
    pairs = store.select(config.split, config.lang)
    damaged = 0
    if model.image_tuned and (store.tower is None or differences(model.image_provenance or {}, store.tower)):
        say(f"{store.path} has the features of another tower: encoding its pictures with that of {config.run}")
        images, kept = encode_files(model, pairs.image_files, config.max_damaged)
        damaged = len(pairs) - len(kept)
        pairs = pairs.subset(kept)
    else:
        check_store(config.run, model, store.path, store.width, store.tower)
        images = encode_stored(model, store, pairs.rows)
    captions = pairs.captions
    own = distributed.own_part(len(captions), CHUNK)
    parts = [torch.empty(0, model.dim)]
    with track("encoding", "captions", len(own)) as task:
        for start in own[::CHUNK]:
            parts.append(model.encode_text(captions[start : min(start + CHUNK, own.stop)]))
            task.advance(len(parts[-1]))
    texts = distributed.gather_rows(torch.cat(parts))
    found = distributed.from_main(lambda: retrieval_metrics.retrieval(images, texts, torch.from_numpy(pairs.owner)))
    about = {"store": str(store.path), "split": config.split, "lang": list(config.lang), "damaged": damaged}
    return found | about | {"definition": retrieval_metrics.DEFINITION}


def encode_stored(model: LiT, store: FeatureStore, rows: np.ndarray) -> torch.Tensor:
    """Features [N, D] of these rows of a store, of which every rank encodes its part."""
    own = distributed.own_part(len(rows), 8192)
    blocks = store.blocks(rows[own.start : own.stop])
    return distributed.gather_rows(torch.cat([torch.empty(0, model.dim), *map(model.encode_features, blocks)]))


def evaluate_classes(model: LiT, config: EvalConfig, where: Path) -> dict[str, Any]:
    """Zero-shot accuracy on a tree of class folders, or on a feature store made from one."""
    damaged = 0
    if (where / MANIFEST).exists():
        store = FeatureStore(where)
        check_store(config.run, model, where, store.width, store.tower)
        if "label" not in store.metadata.column_names:
            raise DataError(f"{where} has no classes: embed a tree with one folder of images per class")
        owners = store.metadata["label"].to_pylist()
        names = sorted(set(owners))
        features = encode_stored(model, store, np.arange(len(store)))
    else:
        tree = class_folders(where)
        names = list(tree)
        owners, features, damaged = encode_tree(model, tree, config.max_damaged)
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[owner] for owner in owners])

    def measure() -> dict[str, Any]:
        classifier = model.zero_shot(names, config.templates)
        found = zero_shot_metrics.accuracy(classifier.scores(features), labels)
        return found | {"templates": classifier.templates}

    return distributed.from_main(measure) | {
        "classes_at": str(where),
        "class_names": [canonicalize(name) for name in names],
        "damaged": damaged,
        "definition": zero_shot_metrics.DEFINITION,
    }


def encode_tree(model: LiT, tree: dict[str, list[Path]], max_damaged: float) -> tuple[list[str], torch.Tensor, int]:
    """The class of every readable image, the images' features [B, D], and how many could not be read."""
    owners = [name for name, images in tree.items() for _ in images]
    features, kept = encode_files(model, [file for images in tree.values() for file in images], max_damaged)
    return [owners[i] for i in kept], features, len(owners) - len(kept)


def encode_files(model: LiT, files: Sequence[Path | str], max_damaged: float) -> tuple[torch.Tensor, np.ndarray]:
    """Features [B, D] of the image files that can be read, and their positions [B] among `files`.

    Every rank encodes its part. Raises `DataError` where more than the share `max_damaged` can't be read, or none can.
    """
    tower = model.load_image_tower()
    kept: list[int] = []
    own = distributed.own_part(len(files), BATCH)
    parts, damaged = [torch.empty(0, model.dim)], 0

    def locate(i: int) -> tuple[str, Path]:
        return str(files[i]), Path(files[i])

    name = "auto" if distributed.world_size() == 1 else "torch"
    runtime = pick_runtime(tower, own, locate, name=name, precision="float32", batch_size=BATCH)
    with track("embedding", "images", len(own)) as task:
        for batch, features in encode_images(runtime, tower.preprocess, own, locate, batch_size=BATCH):
            for one in batch:
                if one.damage is None:
                    kept.append(one.row)
                    continue
                damaged += 1
                say(f"skipped {one.key}: {one.damage.reason}")
                if damaged > max_damaged * len(files):
                    raise DataError(
                        f"{damaged:,} of {len(files):,} images can't be read (at most {max_damaged:.1%} may): "
                        f"{one.key}: {one.damage.reason}; mend or remove them, or raise --max-damaged"
                    )
            if features is not None:
                parts.append(model.encode_features(features))
            task.advance(len(batch))
    kept = [row for part in distributed.gather_objects(kept) for row in part]
    damaged = distributed.sum_counts(damaged)
    if damaged > max_damaged * len(files):
        raise DataError(f"{damaged:,} of {len(files):,} images can't be read (at most {max_damaged:.1%} may)")
    if not kept:
        raise DataError(f"none of the {len(files):,} images can be read")
    return distributed.gather_rows(torch.cat(parts)), np.array(kept)
