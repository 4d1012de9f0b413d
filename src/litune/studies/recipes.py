"""Recipes: functions that return complete configs."""

from __future__ import annotations

from pathlib import Path

from litune.config import EmbedConfig, EvalConfig, TuneConfig


def quickstart_embed(folder: Path) -> EmbedConfig:
    """Embed the quickstart's rendered emoji with EfficientNet-Lite0."""
    return EmbedConfig(pairs=folder / "emoji", image_tower="efficientnet-lite0", out=folder / "features")


def quickstart_tune(folder: Path, seed: int) -> TuneConfig:
    """Tune MiniLM on the quickstart's emoji: few pairs need small batches and a low temperature."""
    return TuneConfig(
        store=folder / "features",
        text_tower="minilm",
        out=folder / "run",
        duration="8kpairs",
        batch_size=128,
        learning_rate=4e-4,
        head_rate=0.1,
        logit_scale=2.3,
        temperature_rate=1,
        evaluations=4,
        seed=seed,
    )


def quickstart_eval(folder: Path) -> EvalConfig:
    """Evaluate on the 300 emoji that were held out."""
    return EvalConfig(run=folder / "run", store=folder / "features", split="val")
