"""How long zero-shot evaluation from cached features takes, and how near that is to what the machine could do.

`python benchmarks/eval_speed.py`; what the figures mean stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from bench_run import machine, start_run
from bench_store import write_store

from litune.evaluation import class_vectors as prompts
from litune.evaluation import zero_shot
from litune.evaluation.embedded import ROWS
from litune.evaluation.subject import Subject
from litune.model.lit import LiT
from litune.store.store import FeatureStore


def peak_gb() -> float:
    """The most memory that this process has had resident, in GB (10⁹ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make_model(folder: Path, options: argparse.Namespace) -> LiT:
    """A model at its first step: the text tower with a new head, features of the width asked for."""
    write_store(folder, [f"caption {i}" for i in range(8)], options.dim)
    run = start_run(folder, text_tower=options.text_tower, batch_size=4, duration="1steps", precision="float32")
    return run.model.eval()


@torch.no_grad()
def bare_tower(subject: Subject, texts: list[str]) -> float:
    """Seconds that the text tower alone takes for these texts, tokenised, sorted and packed before."""
    model = subject.model
    order = sorted(texts, key=len)
    seconds = 0.0
    for start in range(0, len(order), 256):
        tokens = model.tokenizer(order[start : start + 256])
        packed = model.text.pack(tokens, torch.device("cpu"), bfloat16=subject.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=subject.bfloat16):
            begin = time.perf_counter()
            model.text(packed)
            seconds += time.perf_counter() - begin
    return seconds


@torch.no_grad()
def bare_products(store: FeatureStore, weights: torch.Tensor) -> float:
    """Seconds for the products of features and class vectors alone, without reading, ranking or softmax."""
    block = torch.randn(ROWS, weights.shape[1])
    begin = time.perf_counter()
    for start in range(0, len(store), ROWS):
        block[: len(store) - start] @ weights.T
    return time.perf_counter() - begin


def measure(model: LiT, store: FeatureStore, bfloat16: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One precision's figures, and its predictions."""
    names = prompts.class_names("imagenet1k")[: options.classes]
    templates = prompts.dataset_templates("imagenet1k")[: options.templates]
    subject = Subject("bench", Path("bench"), model, bfloat16)
    subject.encode_text(["a first text, which builds kernels"] * 2 + [f"text {i}" for i in range(300)])
    before = peak_gb()
    begin = time.perf_counter()
    weights = subject.vectors(names, templates)
    texts_done = time.perf_counter()
    labels = np.arange(len(store)) % len(names)
    blocks = (model.encode_features(raw) for raw in store.blocks(np.arange(len(store)), ROWS))
    outcomes = zero_shot.classify(blocks, weights, list(labels[:, None]), float(model.scale.detach()))
    done = time.perf_counter()
    texts = [t.replace("{}", name.lower()) for name in names for t in templates]
    some = texts[:: max(1, len(texts) // options.bare)]
    bare = bare_tower(subject, some) / len(some)
    products = bare_products(store, weights)
    rate = subject.vectors.texts / (texts_done - begin)
    return {
        "texts": subject.vectors.texts,
        "texts_per_second": rate,
        "bare_tower_texts_per_second": 1 / bare,
        "share_of_bare_tower": rate * bare,
        "seconds_texts": texts_done - begin,
        "seconds_scores": done - texts_done,
        "seconds_products": products,
        "seconds": done - begin,
        "limit_seconds": subject.vectors.texts * bare + products,
        "gb_grown": peak_gb() - before,
        "predicted": outcomes.predicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-tower", default="minilm", help="minilm, or hf:FOLDER of another BERT")
    parser.add_argument("--dim", type=int, default=1280, help="the width of the stored features")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--templates", type=int, default=80)
    parser.add_argument("--bare", type=int, default=8000, help="texts that the bare tower is timed on")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append", default=[])
    parser.add_argument("--threads", type=int, help="torch's threads; by default as many as torch takes")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "small", options)
        write_store(Path(folder) / "images", [f"caption {i}" for i in range(options.images)], options.dim)
        store = FeatureStore(Path(folder) / "images")
        for precision in options.precision or ["float32", "bfloat16"]:
            found[precision] = measure(model, store, precision == "bfloat16", options)
    predicted = [one.pop("predicted") for one in found.values()]
    print(f"{options.images:,} images, {options.classes:,} classes, {options.templates} templates, D={options.dim}")
    print(f"{'':12}{'texts/s':>10}{'bare':>10}{'share':>8}{'texts s':>10}{'scores s':>10}{'products s':>12}{'GB':>8}")
    for precision, one in found.items():
        print(
            f"{precision:12}{one['texts_per_second']:>10,.0f}{one['bare_tower_texts_per_second']:>10,.0f}"
            f"{one['share_of_bare_tower']:>8.2f}{one['seconds_texts']:>10.1f}{one['seconds_scores']:>10.1f}"
            f"{one['seconds_products']:>12.1f}{one['gb_grown']:>8.2f}"
        )
    same = float((predicted[0] == predicted[-1]).mean())
    print(f"predictions that are the same in both precisions: {same:.1%} (of random features)")
    settings = {name: getattr(options, name) for name in ("images", "classes", "templates", "dim", "text_tower")}
    print(json.dumps({"precisions": found, "same_predictions": same, **settings, **machine()}))


if __name__ == "__main__":
    main()
