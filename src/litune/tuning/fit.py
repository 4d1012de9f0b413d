"""Feature store → run in seconds: both towers locked, linear heads in closed form."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from litune import distributed
from litune.config import FitConfig, TuneConfig, command
from litune.devices import pick_bfloat16, pick_device
from litune.evaluation.retrieval import retrieval
from litune.model.build import make_model, make_tokenizer, started_from, text_spec
from litune.model.card import write_card
from litune.model.hubs import Bank
from litune.model.lit import LiT
from litune.model.run_folder import load, save_model
from litune.progress import say
from litune.store.selection import Selection, check_one_tower, choose_mixture
from litune.store.store import FeatureStore, library_versions
from litune.tuning.held_out import held_out_part
from litune.tuning.hubs import MOST, Pairs, draw, keep_bank
from litune.tuning.output import can_go_on, prepare_run
from litune.tuning.start import HeldOutPairs, Options, start_heads, text_vectors
from litune.tuning.state import describe_pairs


@command(FitConfig)
def fit(config: FitConfig) -> LiT:
    """Fit linear heads to a feature store's pairs in closed form, write a run folder, and return the model.

    Both towers stay as they are. Raises `StoreError`, `TowerError` or `ConfigError` for what can't be used, and
    `OutputExistsError` where a run is at `config.out`.
    """
    began = time.monotonic()
    stores = [FeatureStore(path) for path in config.stores]
    check_one_tower(stores)
    settings = tune_settings(config)
    spec = text_spec(settings)
    train, val = choose_mixture(stores, settings)
    with distributed.claimed(config.out):
        goes_on = can_go_on(settings)
        device = pick_device(config.device)
        torch.manual_seed(config.seed)
        start = started_from(spec, settings)
        tokenizer = make_tokenizer(spec, settings, (), start)
        model = make_model(train, spec, tokenizer, settings, start, device).to(device)
        options = Options(config.method, config.image_shrinkage, config.text_shrinkage)
        facts = start_heads(model, train, settings, options)
        of_val = features_of(model, held_out_part(val), settings) if val else None
        held_out = retrieval(*of_val) if of_val else None
        if not goes_on:
            prepare_run(settings)
        hubs = keep_fitted_bank(model, train, of_val, settings)
        seconds = time.monotonic() - began
        save_model(config.out, model, manifest(settings, model, train, val, facts, held_out, seconds) | hubs)
        write_card(config.out)
    recall = f" · held-out T→I R@10 {held_out['text_to_image']['recall@10']:.1%}" if held_out else ""
    say(
        f"fitted {config.text_tower} ({config.method}) to {len(train):,} images with {train.offsets[-1]:,} captions "
        f"in {seconds:.0f} s; wrote {config.out}{recall}"
    )
    return load(config.out, device=config.device)


def tune_settings(config: FitConfig) -> TuneConfig:
    """The fit as settings of tuning, in which nothing is tuned: what reads a run's config reads this one."""
    settings = {setting.name: getattr(config, setting.name) for setting in dataclasses.fields(config)}
    for name in ("method", "image_shrinkage", "text_shrinkage"):
        del settings[name]
    return TuneConfig(
        **settings,
        locking="LL",
        start="fit",
        image_head="none" if config.method == "ridge" else "linear",
    )


def features_of(model: LiT, pairs: Selection, settings: TuneConfig) -> Pairs:
    """Features of images and of their captions, by the texts' kept vectors, and the image of each caption."""
    vectors = text_vectors(model, pairs, pick_bfloat16(settings.precision, model.logit_scale.device))
    both = HeldOutPairs.of(vectors.blocks())
    with torch.no_grad():
        texts = model.features_of_texts(torch.from_numpy(both.texts).to(model.logit_scale.device)).cpu()
    return model.encode_features(both.images), texts, torch.from_numpy(both.owner)


def keep_fitted_bank(model: LiT, train: Selection, of_val: Pairs | None, settings: TuneConfig) -> dict[str, Any]:
    """`keep_bank` of a fit; nothing where there is too little to decide on."""
    drawn = draw(train, MOST, settings.seed) if of_val else None
    if of_val is None or drawn is None:
        return {}
    pairs, numbers = drawn
    images, texts, _ = features_of(model, pairs, settings)
    bank = Bank.of(texts[torch.from_numpy(numbers)], images)
    return keep_bank(settings.out, bank, of_val)


def manifest(
    settings: TuneConfig,
    model: LiT,
    train: Selection,
    val: Selection | None,
    facts: dict[str, Any],
    held_out: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """Where everything in the run came from."""
    heads = (*model.text_head.parameters(), *model.image_head.parameters())
    return {
        "complete": True,
        "text_tower": settings.text_tower,
        "locking": settings.locking,
        **describe_pairs(settings, train, val),
        "fit": facts,
        "tuned_parameters": sum(parameter.numel() for parameter in heads),
        "steps": 0,
        "pairs_seen": int(train.offsets[-1]),
        "seconds": round(seconds, 1),
        "precision": "bfloat16" if pick_bfloat16(settings.precision, model.logit_scale.device) else "float32",
        "ranks": 1,
        "seed": settings.seed,
        "libraries": library_versions(),
        "held_out": held_out,
    }
