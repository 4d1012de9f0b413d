"""A tuning run at its first step, and the machine that it runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from litune.config import TuneConfig
from litune.model.build import make_model, make_tokenizer, text_spec
from litune.store.selection import choose_pairs
from litune.store.store import FeatureStore
from litune.towers.locking import train_unlocked
from litune.tuning.run import Tuning


def start_run(store: Path, **settings: Any) -> Tuning:
    """What `litune tune` has made when its first step begins: the paper's start, nothing held out."""
    settings = {"start": "random", "max_tokens": 16} | settings  # as in the figures so far
    config = TuneConfig(store=store, out=store / "run", holdout=0.0, device="cpu", **settings)
    spec = text_spec(config)
    train, _ = choose_pairs(FeatureStore(store), config)
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer(spec, config, train.iterate_captions())
    model = make_model(train, spec, tokenizer, config)
    run = Tuning(config, train, None, model, torch.device("cpu"))
    train_unlocked(run.model)
    return run


def machine() -> dict[str, Any]:
    """The processor, and what is used of it."""
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
