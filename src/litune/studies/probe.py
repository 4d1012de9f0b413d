"""Feature stores → how promising their locked towers are for these pairs, in about a minute and before any tuning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from litune.config import ProbeConfig, TuneConfig, command
from litune.devices import pick_bfloat16, pick_device
from litune.errors import ConfigError, DataError
from litune.evaluation.intervals import DEFINITION as INTERVALS
from litune.evaluation.intervals import interval, paired
from litune.files import check_file, write_json
from litune.model.build import make_model, make_tokenizer, text_spec
from litune.progress import duration, say, track
from litune.schedules import parse_duration
from litune.store.selection import Selection, choose_pairs
from litune.store.store import FeatureStore
from litune.studies.alignment import (
    DEFINITIONS,
    NEIGHBOURS,
    VALIDATION,
    best_strength,
    image_ranks,
    mutual_neighbours,
    relative,
    ridge_map,
)
from litune.studies.compare import grid
from litune.studies.sampled import embed_samples
from litune.text.registry import USE_M3, TextSpec, TextTower, make_text_tower, parse_text_spec
from litune.text.tokenizers import Tokenizer
from litune.text.vectors import encode_texts
from litune.towers.locking import train_unlocked
from litune.tuning.batching import default_duration
from litune.tuning.closed_form import Moments, Sums, cca
from litune.tuning.run import Tuning
from litune.tuning.start import HeldOutPairs, Options, choose

KS = (1, 5, 10)
COLUMNS = {
    "neighbours": "neighbours",
    "anchors recall@10": "anchors R@10",
    "linear recall@1": "linear R@1",
    "linear recall@10": "linear R@10",
    "fit recall@1": "fit R@1",
    "fit recall@10": "fit R@10",
}
"""The figures of the table, and what they are called there."""
HEADLINE = "neighbours"
"""What stores are ordered by: nothing is learned for it, and it agrees best with tuned runs (docs/probe.md)."""
FITTED = "fit recall@10"
"""What features of one tower are compared by: what litune fit would reach on the sample."""
LEAST = 2 * NEIGHBOURS
MEASURE_SECONDS = 3.0
MEASURE_IMAGES = 2048


@dataclass(frozen=True)
class Probed:
    """What one store showed: plain values for people, and each image's outcome for comparisons."""

    facts: dict[str, Any]
    keys: tuple[str, ...]
    outcomes: np.ndarray
    owner: np.ndarray | None = None
    """The image of each outcome, where an image has several."""


@command(ProbeConfig)
def probe(config: ProbeConfig) -> dict[str, Any]:
    """Figures of every store, the most promising first, with intervals and paired differences to the first.

    Raises `StoreError` for what can't be read, `TowerError` or `ConfigError` for a text tower that can't be used,
    `DataError` for stores with too few pairs, `OutputExistsError` where the file of `config.json` is there.
    """
    check_file(config.json, "--json", config.overwrite)
    spec = parse_text_spec(config.text_tower)
    if not spec.pretrained or spec.kind == "run":
        raise ConfigError(f"--text-tower is {config.text_tower}: name a pre-trained one that was not tuned, as minilm")
    with TemporaryDirectory(prefix="litune-probe-") as folder:
        stores = embed_samples(config, Path(folder)) if config.features else [Path(store) for store in config.stores]
        results = compare(config, stores, spec)
    if config.json is not None:
        write_json(config.json, results)
    return results


def compare(config: ProbeConfig, stores: Sequence[Path], spec: TextSpec) -> dict[str, Any]:
    """The stores, the most promising first; features of one tower in their order, held against the first."""
    settings = [tune_settings(config, path) for path in stores]
    tokenizer = make_tokenizer(text_spec(settings[0]), settings[0], [])
    tower = make_text_tower(spec, vocab_size=tokenizer.vocab_size, max_tokens=config.max_tokens)
    texts = Texts(tower.to(pick_device(config.device)).eval(), tokenizer)
    probed = [probe_store(config, of_store, texts) for of_store in settings]
    for store, features in zip(probed, config.features, strict=False):
        store.facts["features"] = features
    if not config.features:
        probed.sort(key=lambda store: -store.facts["figures"][HEADLINE])
    return {
        "text_tower": config.text_tower,
        "headline": FITTED if config.features else HEADLINE,
        "stores": [store.facts | against(probed[0], store) for store in probed],
        "comparable": len({store.keys for store in probed}) == 1,
        "definitions": DEFINITIONS | {"interval": INTERVALS},
    }


def tune_settings(config: ProbeConfig, store: Path) -> TuneConfig:
    """How the store would be tuned on: the same pairs, the same default settings. Nothing is ever written to `out`."""
    train, val = config.images
    return TuneConfig(
        store=store,
        text_tower=config.text_tower,
        out=store / "unused",
        locking="LL" if config.text_tower == USE_M3 else None,
        split=config.split,
        val_split=config.val_split,
        holdout=val / (train + val) if config.features else config.holdout,
        lang=config.lang,
        max_tokens=config.max_tokens,
        evaluations=0,
        device=config.device,
    )


class Texts:
    """The frozen text tower, each distinct text encoded once for all stores."""

    def __init__(self, tower: TextTower, tokenizer: Tokenizer) -> None:
        self.tower, self.tokenizer = tower, tokenizer
        self.known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Raw vectors [N, W] of N captions."""
        device = next((p.device for p in self.tower.parameters()), torch.device("cpu"))
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known]
        if new:
            tokens, bfloat16 = self.tokenizer(new), pick_bfloat16("auto", device)
            with track("encoding", "captions", len(new)) as task:
                vectors = encode_texts(self.tower, tokens, device, bfloat16=bfloat16, advance=task.advance)
            self.known |= dict(zip(new, vectors, strict=True))
        return torch.stack([self.known[caption] for caption in captions])


def probe_store(config: ProbeConfig, settings: TuneConfig, texts: Texts) -> Probed:
    """Everything about one store."""
    store = FeatureStore(settings.store)
    all_train, all_val = choose_pairs(store, settings)
    train_most, val_most = config.images
    train = drawn(all_train, train_most, config.seed)
    val = drawn(all_val, val_most, config.seed) if all_val is not None else None
    if val is None or len(val) < LEAST or len(train) < 2 * LEAST:
        raise DataError(
            f"{store.path} has {len(train):,} images to learn from and {len(val or ()):,} held out, a probe needs "
            f"{2 * LEAST} and {LEAST}: embed more, or raise --holdout"
        )
    say(f"probing {store.path}: {len(train):,} images to learn from, {len(val):,} to measure on")
    learned, measured = Pairs(train, texts), Pairs(val, texts)
    outcomes = measure(learned, measured, config.seed)
    figures = {name: float(values.mean()) for name, values in outcomes.items()}
    bounds = {
        name: list(interval(values, measured.owner.numpy() if len(values) != len(val) else None))
        for name, values in outcomes.items()
    }
    facts = {
        "store": str(store.path),
        "tower": (store.tower or {}).get("spec", "unknown"),
        "width": store.width,
        "train_images": len(train),
        "images": len(val),
        "captions": len(measured.owner),
        "figures": figures,
        "intervals": bounds,
        "chance": {name: chance(name, len(val)) for name in outcomes},
        "storage": storage(store),
    }
    if config.features:
        return Probed(facts, tuple(val.keys), outcomes[FITTED], measured.owner.numpy())
    return Probed(facts | {"tuning": tuning_time(all_train, settings)}, tuple(val.keys), outcomes[HEADLINE])


def drawn(pairs: Selection, most: int, seed: int) -> Selection:
    """At most so many of the images, drawn by the seed and in their order: the same of every store of these images."""
    if len(pairs) <= most:
        return pairs
    return pairs.subset(np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most]))


class Pairs:
    """Raw features of a selection's images and of their captions."""

    def __init__(self, pairs: Selection, texts: Texts) -> None:
        self.images = torch.from_numpy(pairs.features())
        self.texts = texts(pairs.captions)
        self.owner = torch.from_numpy(pairs.owner)

    def take(self, images: np.ndarray) -> HeldOutPairs:
        """The pairs of these images, in this order."""
        texts = [np.flatnonzero(self.owner.numpy() == image) for image in images]
        owner = np.repeat(np.arange(len(images)), [len(rows) for rows in texts])
        return HeldOutPairs(self.images.numpy()[images], self.texts.numpy()[np.concatenate(texts)], owner)

    def sums(self, images: np.ndarray) -> Sums:
        """The sums over the pairs of these images."""
        pairs = self.take(images)
        sums = Sums(pairs.images.shape[1], pairs.texts.shape[1])
        sums.add(pairs.images, pairs.texts, np.bincount(pairs.owner))
        return sums


def measure(learned: Pairs, measured: Pairs, seed: int) -> dict[str, np.ndarray]:
    """Outcomes by figure: per image for neighbours, per caption for the recalls.

    Both sides are centred by the means of the pairs to learn from, as litune tune does it with the images, and
    brought to length one.
    """
    image_mean, text_mean = learned.images.mean(0), learned.texts.mean(0)
    anchor_images, anchor_texts = F.normalize(learned.images - image_mean), F.normalize(learned.texts - text_mean)
    images, texts = F.normalize(measured.images - image_mean), F.normalize(measured.texts - text_mean)
    outcomes = {"neighbours": mutual_neighbours(images, means(texts, measured.owner, len(images)))}
    anchors = means(anchor_texts, learned.owner, len(anchor_images))
    by_anchors = image_ranks(relative(images, anchor_images), relative(texts, anchors), measured.owner)
    strength = best_strength(anchor_texts, anchor_images, learned.owner, seed)
    matrix = ridge_map(anchor_texts, anchor_images[learned.owner], strength)
    by_map = image_ranks(images, F.normalize(texts @ matrix), measured.owner)
    for name, ranks in (("anchors", by_anchors), ("linear", by_map), ("fit", fitted_ranks(learned, measured, seed))):
        outcomes |= {f"{name} recall@{k}": (ranks < k).astype(float) for k in KS}
    return outcomes


def fitted_ranks(learned: Pairs, measured: Pairs, seed: int) -> np.ndarray:
    """The rank of each measured text's own image after litune fit's closed form, chosen on a fifth of the images."""
    images = len(learned.images)
    order = np.random.default_rng(seed).permutation(images)
    held_out, rest = np.split(order, [max(1, round(VALIDATION * images))])
    sums = learned.sums(rest)
    (image, text, *powers), _ = choose([(Moments(sums), learned.take(held_out))], Options())
    maps = cca(Moments(sums + learned.sums(held_out)), image, text).weighted(*powers)
    return image_ranks(*measured.take(np.arange(len(measured.images))).features(maps), measured.owner)


def means(texts: Tensor, owner: Tensor, images: int) -> Tensor:
    """The mean of each image's captions, of length one: [B, W]."""
    return F.normalize(torch.zeros(images, texts.shape[1]).index_add_(0, owner, texts))


def chance(figure: str, images: int) -> float:
    """What features that have nothing to do with each other would reach."""
    if figure == "neighbours":
        return NEIGHBOURS / (images - 1)
    return min(1.0, int(figure.rpartition("@")[2]) / images)


def storage(store: FeatureStore) -> dict[str, Any]:
    """Bytes of features per image and of a million of them, and how long those would take to embed."""
    each = store.width * np.dtype(store.manifest.get("dtype", "float16")).itemsize
    rate = store.manifest.get("images_per_second")
    return {
        "bytes_per_image": each,
        "bytes_per_million": 1_000_000 * each,
        "images_per_second_when_embedded": rate,
        "embedding_hours_per_million": round(1e6 / rate / 3600, 2) if rate else None,
    }


def tuning_time(train: Selection, settings: TuneConfig) -> dict[str, Any]:
    """How fast litune tune would go at its defaults and how long it would take: some of its own steps, timed."""
    sample = drawn(train, MEASURE_IMAGES, 0)
    spec = text_spec(settings)
    device = pick_device(settings.device)
    tokenizer = make_tokenizer(spec, settings, sample.captions)
    model = make_model(sample, spec, tokenizer, settings).to(device)
    settings = dataclasses.replace(settings, duration="1000000steps")  # until time is up
    run = Tuning(settings, sample, None, model, device)
    train_unlocked(model)
    pairs = 0
    with closing(run.inputs(0)) as coming:
        run.step(next(coming))  # the first one allocates and builds kernels
        began = time.monotonic()
        for inputs in coming:
            run.step(inputs)
            pairs += run.size
            if time.monotonic() - began >= MEASURE_SECONDS:
                break
    run.check()
    rate = pairs / (time.monotonic() - began)
    steps = parse_duration(default_duration(len(train), int(train.offsets[-1])), "duration").steps(
        batch_size=run.size, images=len(train), total=None
    )
    return {
        "pairs_per_second": round(rate, 1),
        "pairs": steps * run.size,
        "seconds": round(steps * run.size / rate, 1),
        "tuned_parameters": run.tuned.parameters,
        "measured": f"its own steps, timed for {MEASURE_SECONDS:.0f} seconds at its default settings",
    }


def against(best: Probed, probed: Probed) -> dict[str, Any]:
    """The paired difference of the headline figure to the most promising store's, where both have the same images."""
    if probed is best or probed.keys != best.keys:
        return {}
    return {"to_the_first": paired(probed.outcomes, best.outcomes, best.owner)}


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, the most promising store first, with what its figures mean."""
    headline, first = results["headline"], results["stores"][0]
    names = [name for name in first["figures"] if name in COLUMNS]
    last = "embedding 1M" if "features" in first else "tuning"
    titles = [COLUMNS[name] for name in names if name != headline]
    lines = [["", COLUMNS[headline], "to the first", *titles, "1M images", last]]
    for store in results["stores"]:
        shown = {name: percent(store["figures"][name], *store["intervals"][name]) for name in names}
        lines.append(
            [
                called(store),
                shown.pop(headline),
                difference(store.get("to_the_first")),
                *shown.values(),
                f"{store['storage']['bytes_per_million'] / 1e9:.1f} GB",
                how_long(store),
            ]
        )
    chances = {name: f"{100 * first['chance'][name]:.1f}" for name in names}
    lines.append(["chance", chances.pop(headline), "", *chances.values(), "", ""])
    notes = [
        f"In percent, with 95% intervals; {first['images']:,} images and {first['captions']:,} captions that nothing "
        f"was learned from, {first['train_images']:,} images to learn from, captions by {results['text_tower']}.",
        *results["definitions"].values(),
    ]
    if "tuning" in first:
        notes.append(f"tuning: litune tune's default length at the speed of {first['tuning']['measured']}.")
    else:
        notes.append(f"Features of {first['tower']}; embedding 1M: hours for a million images at the sample's speed.")
    if not results["comparable"]:
        notes.insert(0, "The stores hold different pairs: their figures can't be compared.")
    return "\n\n".join([grid(lines), *notes])


def called(store: dict[str, Any]) -> str:
    """A store in the table: its features where these are compared, else its folder and tower; and the width."""
    if "features" in store:
        return f"{store['features']} ({store['width']})"
    return f"{Path(store['store']).name} ({store['tower']}, {store['width']})"


def how_long(store: dict[str, Any]) -> str:
    """How long tuning on the store would take; where features are compared, embedding a million images."""
    if "features" in store:
        storage = store["storage"]
        return f"{storage['embedding_hours_per_million']:,.1f} h at {storage['images_per_second_when_embedded']:,.0f}/s"
    return f"{duration(store['tuning']['seconds'])} at {store['tuning']['pairs_per_second']:,.0f} pairs/s"


def percent(share: float, low: float, high: float) -> str:
    """A share with its interval, in percent.

    >>> percent(0.181, 0.167, 0.1932)
    '18.1 (16.7–19.3)'
    """
    return f"{100 * share:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def difference(interval: dict[str, float] | None) -> str:
    """A paired difference in points with its interval.

    >>> difference({"difference": -0.1, "low": -0.12, "high": -0.08})
    '−10.0 (−12.0 to −8.0)'
    """
    if interval is None:
        return ""
    return f"{points(interval['difference'])} ({points(interval['low'])} to {points(interval['high'])})"


def points(share: float) -> str:
    """A difference of shares in points, signed."""
    return f"{100 * share:+.1f}".replace("-", "−")
