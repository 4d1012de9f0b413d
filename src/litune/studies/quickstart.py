"""All of litune on real data in minutes, on a CPU: render, embed, tune, evaluate, search."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from litune.config import QuickstartConfig, command, to_json
from litune.errors import OutputExistsError, RunError, StoreError
from litune.evaluation.evaluate import evaluate
from litune.evaluation.zero_shot import accuracies, classify
from litune.files import read_json, write_json
from litune.index.gallery import write_page, write_sheet
from litune.index.index import nearest_images
from litune.model.lit import LiT
from litune.model.run_folder import CONFIG, load
from litune.model.run_folder import MANIFEST as RUN_MANIFEST
from litune.progress import duration, say, track
from litune.store.embed import embed
from litune.store.store import MANIFEST as STORE_MANIFEST
from litune.store.store import FeatureStore, library_versions
from litune.studies import emoji as emoji_pairs
from litune.studies.emoji import Emoji
from litune.studies.recipes import quickstart_embed, quickstart_eval, quickstart_tune
from litune.tuning.output import changed_settings
from litune.tuning.tune import tune

T = TypeVar("T")

# Free-form queries that no emoji is named, for the gallery beside held-out names.
FREE_QUERIES = ("a wild animal", "a way to travel", "a happy face", "something to eat")


@command(QuickstartConfig)
def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Render, embed, tune, evaluate, classify and search emoji; returns the figures of results.json.

    Raises `MissingExtraError` where the extra `quickstart` is not installed.
    """
    out = config.out
    if out.exists() and (not out.is_dir() or (not (out / "emoji").exists() and any(out.iterdir()))):
        raise OutputExistsError(f"{out} is there and not a quickstart of litune: choose another --out")
    began = time.monotonic()
    stages: dict[str, dict[str, Any]] = {}

    emoji = emoji_pairs.find_emoji()
    _timed(stages, "render", "pictures", lambda: (None, _render(emoji, out)))
    store = _timed(stages, "embed", "images", lambda: _embed(out))
    model = _timed(stages, "tune", "pairs", lambda: _tune(config))
    results = _timed(stages, "evaluate", "captions", lambda: (evaluate.run(quickstart_eval(out)), False))
    counts = {
        "render": len(emoji),
        "embed": len(store),
        "tune": read_json(out / "run" / RUN_MANIFEST, RunError)["pairs_seen"],
        "evaluate": results["retrieval"]["captions"],
    }
    for name, stage in stages.items():
        stage["count"] = counts[name]
        if not stage["reused"]:
            stage["rate"] = round(counts[name] / max(stage["seconds"], 1e-3), 1)

    held_out = [e for e in emoji if e.split == "val"]
    zero_shot = _zero_shot(model, store, held_out)
    pictures = _gallery(model, store, held_out, out)
    figures = {
        "retrieval": results["retrieval"],
        "zero_shot": zero_shot,
        "stages": stages,
        "seconds": round(time.monotonic() - began, 1),
        "seed": config.seed,
        "gallery": pictures,
        "credit": emoji_pairs.CREDIT,
        "libraries": library_versions(),
    }
    write_json(out / "results.json", figures)
    _show(figures, out)
    return figures


def _timed(stages: dict[str, dict[str, Any]], name: str, unit: str, work: Callable[[], tuple[T, bool]]) -> T:
    """The result of `work`, whose duration and second value (was it reused?) are noted in `stages`."""
    began = time.monotonic()
    result, reused = work()
    stages[name] = {"seconds": round(time.monotonic() - began, 2), "unit": unit, "reused": reused}
    return result


def _render(emoji: list[Emoji], out: Path) -> bool:
    done = sum((out / "emoji" / "images" / e.key).exists() for e in emoji)
    with track("rendering", "pictures", len(emoji), done) as task:
        emoji_pairs.render(emoji, out / "emoji", lambda: task.advance(1))
    return done == len(emoji)


def _embed(out: Path) -> tuple[FeatureStore, bool]:
    there = out / "features" / STORE_MANIFEST
    if there.exists() and read_json(there, StoreError).get("complete"):
        store = FeatureStore(out / "features")
        say(f"reusing the features of {len(store):,} images in {store.path}: every image is encoded once")
        return store, True
    return embed.run(quickstart_embed(out)), False


def _tune(config: QuickstartConfig) -> tuple[LiT, bool]:
    recipe = quickstart_tune(config.out, config.seed)
    if (recipe.out / CONFIG).exists():
        if changed_settings(read_json(recipe.out / CONFIG, RunError), to_json(recipe)):
            recipe = dataclasses.replace(recipe, overwrite=True)
        elif (recipe.out / RUN_MANIFEST).exists():
            say(f"reusing the tuned run {recipe.out}: remove it to tune again")
            return load(recipe.out), True
    return tune.run(recipe), False


def _zero_shot(model: LiT, store: FeatureStore, held_out: list[Emoji]) -> dict[str, Any]:
    """Classify held-out pictures by class names that are no picture's caption, with an example of each."""
    keys = store.metadata["key"].to_pylist()
    row = {key: i for i, key in enumerate(keys)}
    shown = [e for e in held_out if e.kind is not None]
    classes = list(emoji_pairs.CLASSES)
    features = model.encode_features(store.features([row[e.key] for e in shown]))
    classifier = model.zero_shot(classes)
    labels = np.array([classes.index(e.kind or "") for e in shown])
    figures: dict[str, Any] = dict(
        accuracies(classify([features], classifier.weights, list(labels[:, None])), labels, len(classes)).values
    )
    figures |= {"chance": 1 / len(classes), "images": len(labels), "classes": len(classes)}
    probabilities = classifier.probabilities(features)
    firsts = [next(i for i, e in enumerate(shown) if e.kind == c) for c in classes if c in {o.kind for o in shown}]
    examples = [
        {
            "name": shown[i].name,
            "class": shown[i].kind,
            "probabilities": {c: round(float(p), 4) for c, p in zip(classes, probabilities[i], strict=True)},
        }
        for i in firsts
    ]
    return figures | {"class_names": classes, "templates": classifier.templates, "examples": examples}


def _gallery(model: LiT, store: FeatureStore, held_out: list[Emoji], out: Path) -> dict[str, str]:
    """Write queries and their best held-out pictures as a PNG and an HTML file; returns the paths."""
    kinds = [kind for kind in emoji_pairs.CLASSES if kind != "flag"]  # unseen flags can't be told apart
    names = [next(e for e in held_out if e.kind == kind) for kind in kinds]
    queries = [*(e.name for e in names), *FREE_QUERIES]
    targets = [{e.key} for e in names] + [set[str]() for _ in FREE_QUERIES]
    only = {e.key for e in held_out}
    matches = nearest_images(model, store, model.encode_text(queries), top=len(store))
    rows = [(q, [f for f in row_matches if f.key in only][:6]) for q, row_matches in zip(queries, matches, strict=True)]
    intro = (
        f"Pictures found by text among {len(held_out)} emoji that were never tuned on. "
        "A green frame marks the picture whose name the query is; the last queries are nobody's name."
    )
    write_sheet(out / "gallery.png", rows, targets)
    write_page(out / "gallery.html", "litune quickstart", intro, rows, targets, emoji_pairs.CREDIT)
    return {"png": str(out / "gallery.png"), "html": str(out / "gallery.html")}


def _show(figures: dict[str, Any], out: Path) -> None:
    console = Console(highlight=False)
    retrieval, zero_shot = figures["retrieval"], figures["zero_shot"]
    table = Table(title=f"{retrieval['images']} emoji that were never tuned on, found by their names")
    for column in ("", "R@1", "R@5", "R@10"):
        table.add_column(column, justify="left" if not column else "right")
    for way, name in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        table.add_row(name, *(f"{retrieval[way][f'recall@{k}']:.1%}" for k in (1, 5, 10)))
        table.add_row("  chance", *(f"{retrieval['chance'][way][f'recall@{k}']:.1%}" for k in (1, 5, 10)), style="dim")
        if corrected := retrieval.get("hubs_corrected"):
            table.add_row("  hubs corrected", *(f"{corrected[way][f'recall@{k}']:.1%}" for k in (1, 5, 10)))
    console.print(table)

    stages = Table(title=f"the way, {duration(figures['seconds'])} in all")
    for column in ("stage", "seconds", "rate"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in figures["stages"].items():
        rate = "reused" if stage["reused"] else f"{stage['rate']:,.0f} {stage['unit']}/s"
        stages.add_row(name, f"{stage['seconds']:.1f}", rate)
    console.print(stages)

    classes = Table(
        title=f"zero-shot: {zero_shot['accuracy']:.1%} of {zero_shot['images']} held-out pictures right "
        f"(chance {zero_shot['chance']:.1%})"
    )
    for column in ("picture", *zero_shot["class_names"]):
        classes.add_column(column, justify="left" if column == "picture" else "right")
    for example in zero_shot["examples"]:
        classes.add_row(example["name"], *(f"{p:.0%}" for p in example["probabilities"].values()))
    console.print(classes)

    console.print(f"gallery: {out / 'gallery.html'} and {out / 'gallery.png'}; every figure: {out / 'results.json'}")
    console.print(f"written to {out}/: emoji (pictures, captions.csv), features (the store), run (the model)")
    console.print("\nThe same on your own photos (a folder with a table of captions in it):\n")
    console.print("  litune embed my-photos/ --image-tower efficientnet-lite0 --out my-features", soft_wrap=True)
    console.print("  litune tune my-features --text-tower minilm --out my-run", soft_wrap=True)
    console.print('  litune search my-run my-features "what you look for"', soft_wrap=True)
