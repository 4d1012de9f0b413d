"""Feature store → run: a text tower learns to read the locked image tower (LiT, arXiv 2111.07991)."""

from __future__ import annotations

from typing import Any

import torch

from litune import distributed
from litune.config import TuneConfig, command
from litune.devices import pick_device
from litune.model.build import make_model, make_tokenizer, started_from, starts_fitted, text_spec, with_defaults
from litune.model.card import write_card
from litune.model.lit import LiT
from litune.model.run_folder import MANIFEST, STATE, image_tower_finder, load
from litune.store.selection import check_one_tower, choose_mixture
from litune.store.store import FeatureStore
from litune.tuning.log import OnLog
from litune.tuning.output import can_go_on, prepare_run
from litune.tuning.run import Tuning
from litune.tuning.setup import announce
from litune.tuning.start import for_tuning, start_heads
from litune.tuning.state import go_on


@command(TuneConfig)
def tune(config: TuneConfig, on_log: OnLog | None = None) -> LiT:
    """Tune a text tower on a feature store's pairs, write a run folder, and return the model.

    Goes on with an unfinished run of the same config. `on_log`, from Python, is called with every line of
    metrics.jsonl, as a dict. Under torchrun every process calls it alike; with --shard the model that they return is
    shared by them, and all must run it alike. Raises `StoreError`,
    `TowerError` or `ConfigError` for what can't be used, `OutputExistsError` where the run at `config.out` is
    finished, `OutputBusyError` where another process tunes it, `RunError` where it has another config or the loss stops
    being finite.
    """
    distributed.start(config.device)
    stores = [FeatureStore(path) for path in config.stores]
    check_one_tower(stores)
    spec = text_spec(config)
    train, val = choose_mixture(stores, config)
    with distributed.claimed(config.out):
        goes_on = distributed.from_main(lambda: can_go_on(config))
        asked, config = config, with_defaults(config, spec)
        device = pick_device(config.device)
        torch.manual_seed(config.seed)
        start = started_from(spec, config)
        tokenizer = make_tokenizer(spec, config, train.iterate_captions(), start)
        model = make_model(train, spec, tokenizer, config, start, device).to(device)
        fit: dict[str, Any] | None = None
        if starts_fitted(config, spec):
            begun = goes_on and (config.out / STATE).exists()
            fit = {} if begun else distributed.from_main(lambda: start_heads(model, train, config, for_tuning(config)))
        run = Tuning(config, train, val, model, device, on_log, fit=fit)
        if not goes_on:
            distributed.from_main(lambda: prepare_run(asked))
        announce(run)
        if goes_on:
            go_on(run)
        try:
            run.fit()
        finally:
            if distributed.is_main() and (config.out / MANIFEST).exists():
                write_card(config.out)
    if run.shards is not None:
        model.find_image_tower = image_tower_finder(model, None)
        return model
    return load(config.out, device=config.device)
