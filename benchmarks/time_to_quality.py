"""How long it takes from a finished store to a held-out recall: `litune fit`, `litune tune`, and open_clip on the same.

`python benchmarks/time_to_quality.py STORE --lang en`; what the figures mean stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_open_clip import OpenClipSteps
from bench_run import machine
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from litune.config import TuneConfig
from litune.errors import RunError
from litune.evaluation.retrieval import retrieval
from litune.files import read_json
from litune.image.pictures import ImageTransform, open_rgb
from litune.image.registry import load_image_tower
from litune.pairs.reference import read_bytes
from litune.store.selection import Selection, choose_mixture
from litune.store.store import FeatureStore
from litune.text.registry import parse_text_spec
from litune.tuning import fit as fitting
from litune.tuning.held_out import EVALUATE_MOST
from litune.tuning.run import Tuning

TOKENS = 32
Curve = list[tuple[float, float]]
"""Seconds, those of evaluating left out, and the recall that was found then."""


class Clock:
    """Seconds since it was made, without those of the calls that it was told to leave out."""

    def __init__(self) -> None:
        self.began, self.left_out = time.perf_counter(), 0.0

    def __call__(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.began - self.left_out

    def leaving_out(self, work: Any) -> Any:
        """The function `work`, whose calls don't count."""

        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                self.left_out += time.perf_counter() - begin

        return timed


def without_texts(store: Path, folder: Path) -> Path:
    """The store in another folder, by links, without the vectors of its texts."""
    folder.mkdir()
    for part in store.iterdir():
        if part.name != "text_emb":
            (folder / part.name).symlink_to(part.resolve())
    return folder


def fit_curve(options: argparse.Namespace, store: Path, folder: Path) -> Curve:
    """`litune fit`, every text encoded for it."""
    features_of, clock = fitting.features_of, Clock()
    fitting.features_of = clock.leaving_out(features_of)
    try:
        fitting.fit(store, options.text_tower, folder / "fit", lang=tuple(options.lang), device="cpu")
    finally:
        fitting.features_of = features_of
    seconds, manifest = clock(), read_json(folder / "fit" / "manifest.json", RunError)
    return [(seconds, manifest["held_out"]["text_to_image"]["recall@10"])]


def tune_curve(options: argparse.Namespace, store: Path, folder: Path) -> Curve:
    """`litune tune` with its defaults, from the texts of its start on."""
    from litune.tuning.tune import tune

    evaluate, clock, curve = Tuning.evaluate, Clock(), []

    def noted(run: Tuning) -> dict[str, Any]:
        seconds = clock()
        found = clock.leaving_out(evaluate)(run)
        curve.append((seconds, found["text_to_image"]["recall@10"]))
        return dict(found)

    Tuning.evaluate = noted  # type: ignore[method-assign]
    settings: dict[str, Any] = {"evaluations": options.evaluations, "lang": tuple(options.lang), "device": "cpu"}
    try:
        tune(store, options.text_tower, folder / "run", **settings)
    finally:
        Tuning.evaluate = evaluate  # type: ignore[method-assign]
    return curve


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """The training pictures through open_clip's own transform, each with the tokens of one of its captions."""

    def __init__(self, pairs: Selection, tokens: Tensor, transform: Any) -> None:
        self.files, self.offsets, self.tokens, self.transform = pairs.image_files, pairs.offsets, tokens, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        caption = int(torch.randint(int(self.offsets[row]), int(self.offsets[row + 1]), ()))
        return self.transform(open_picture(self.files[row])), self.tokens[caption]


def open_picture(file: str) -> Image.Image:
    return open_rgb(read_bytes(file))


class OpenClip:
    """open_clip's training with the store's own image tower locked: each step reads its pictures and encodes them."""

    def __init__(self, options: argparse.Namespace, train: Selection, val: Selection, rate: float) -> None:
        from open_clip.tokenizer import HFTokenizer
        from open_clip.transform import image_transform

        assert train.store.tower is not None
        tower = load_image_tower(train.store.tower["spec"])
        own = tower.preprocess
        assert isinstance(own, ImageTransform)
        self.options, self.val = options, val
        folder = parse_text_spec(options.text_tower).name
        captions = train.caption_array.to_pylist()
        self.steps = OpenClipSteps(
            folder, captions, options.peer_batch, TOKENS, False, rate=rate, image_tower=options.timm_name
        )
        self.model = self.steps.model
        self.model.visual.trunk = tower.network  # with the weights that litune's features are of
        to_train, self.to_eval = (image_transform(own.size, train, own.mean, own.std) for train in (True, False))
        pictures = Pictures(train, self.steps.tokens, to_train)
        workers = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
        self.batches = DataLoader(pictures, options.peer_batch, shuffle=True, drop_last=True, **workers)
        self.val_tokens = HFTokenizer(folder, context_length=TOKENS)(val.caption_array.to_pylist())

    def curve(self, limit: float) -> Iterator[tuple[float, float]]:
        """Seconds and recall, every `--peer-every` pairs, until the limit in seconds."""
        clock, since = Clock(), 0
        evaluate = clock.leaving_out(self.recall)
        while True:
            for pixels, tokens in self.batches:
                self.steps.take(pixels, tokens)
                since += len(tokens)
                if since >= self.options.peer_every or clock() >= limit:
                    seconds, since = clock(), 0
                    yield seconds, evaluate()
                    if seconds >= limit:
                        return

    @torch.no_grad()
    def recall(self) -> float:
        """Text→image recall@10 on the held-out pairs."""
        self.model.eval()
        pixels = (self.to_eval(open_picture(file)) for file in self.val.image_files)
        images = [self.model.encode_image(torch.stack(part), normalize=True) for part in batched(pixels, 64)]
        texts = [self.model.encode_text(part, normalize=True) for part in self.val_tokens.split(256)]
        self.model.train()
        found = retrieval(torch.cat(images), torch.cat(texts), torch.from_numpy(self.val.owner))
        return float(found["text_to_image"]["recall@10"])


def batched(values: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    while part := list(islice(values, size)):
        yield part


def peer_curves(options: argparse.Namespace, store: Path) -> dict[str, Curve]:
    """open_clip's, by learning rate; a rate ends when it has reached the last goal, or at the limit."""
    config = TuneConfig(store, options.text_tower, store / "run", lang=tuple(options.lang))
    train, val = choose_mixture([FeatureStore(store)], config)
    assert val is not None
    val = val.subset(np.linspace(0, len(val) - 1, min(EVALUATE_MOST, len(val))).round().astype(int))
    curves: dict[str, Curve] = {}
    for rate in options.peer_rate:
        curve = curves[str(rate)] = []
        for point in OpenClip(options, train, val, rate).curve(options.limit):
            curve.append(point)
            print(f"open_clip at {rate}: {point[0]:.0f} s, R@10 {point[1]:.1%}", flush=True)
            if point[1] >= max(options.goal):
                break
    return curves


def seconds_to(curve: Curve, goal: float) -> float | None:
    return next((round(seconds, 1) for seconds, recall in curve if recall >= goal), None)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    curves = {
        "fit": fit_curve(options, without_texts(options.store, folder / "first"), folder),
        "tune": tune_curve(options, without_texts(options.store, folder / "second"), folder),
    }
    peers = peer_curves(options, options.store) if options.peer_rate else {}
    goals: dict[str, Any] = {}
    for goal in options.goal:
        reached = {name: seconds_to(curve, goal) for name, curve in curves.items()}
        theirs = [seconds for curve in peers.values() if (seconds := seconds_to(curve, goal)) is not None]
        reached["open_clip"] = min(theirs, default=None)
        goals[f"{goal:g}"] = reached
    return {"seconds_to": goals, "curves": {**curves, "open_clip": peers}, "limit": options.limit, **machine()}


def print_table(found: dict[str, Any]) -> None:
    print(f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}")
    print(f"{'seconds to held-out T→I R@10 of':34}{'fit':>10}{'tune':>10}{'open_clip':>12}")
    for goal, reached in found["seconds_to"].items():
        shown = ["–" if value is None else f"{value:,.0f}" for value in reached.values()]
        print(f"{float(goal):<34.0%}{shown[0]:>10}{shown[1]:>10}{shown[2]:>12}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="a feature store with held-out pairs, whose pictures can be read")
    parser.add_argument("--text-tower", default="minilm", help="minilm, or hf:FOLDER of another BERT")
    parser.add_argument("--lang", action="append", default=[], help="only captions in these languages")
    parser.add_argument("--goal", type=float, nargs="+", default=[0.55, 0.6], help="recalls to be reached")
    parser.add_argument("--evaluations", type=int, default=20, help="how often tune's recall is looked at")
    parser.add_argument(
        "--peer-rate", type=float, nargs="*", default=[1e-4, 3e-4, 1e-3], help="open_clip's; none: without it"
    )
    parser.add_argument("--peer-batch", type=int, default=128, help="pairs in open_clip's batch")
    parser.add_argument("--peer-every", type=int, default=2560, help="pairs between looks at open_clip's recall")
    parser.add_argument("--timm-name", default="tf_efficientnet_lite0", help="the store's image tower in timm")
    parser.add_argument("--workers", type=int, default=2, help="open_clip's processes that read pictures")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a rate of open_clip's ends")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print_table(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
