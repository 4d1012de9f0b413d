"""Feature store → run: a text tower learns to read the locked image tower (LiT, arXiv 2111.07991)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from litune import distributed
from litune.config import TuneConfig, command, to_json
from litune.devices import pick_device
from litune.errors import OutputExistsError, RunError
from litune.files import clear_output, read_json, write_json
from litune.model.build import make_model, make_tokenizer, started_from, text_spec
from litune.model.card import write_card
from litune.model.lit import LiT
from litune.model.run_folder import CONFIG, MANIFEST, image_tower_finder, load
from litune.store.selection import check_one_tower, choose_mixture
from litune.store.store import FeatureStore
from litune.tuning.log import OnLog
from litune.tuning.run import Tuning
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
        device = pick_device(config.device)
        torch.manual_seed(config.seed)
        start = started_from(spec, config)
        tokenizer = make_tokenizer(spec, config, train.iterate_captions(), start)
        model = make_model(train, spec, tokenizer, config, start, device).to(device)
        run = Tuning(config, train, val, model, device, on_log)
        if not goes_on:
            distributed.from_main(lambda: prepare_run(config))
        run.announce()
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


def can_go_on(config: TuneConfig) -> bool:
    """Whether an unfinished run of the same config is at the output; raises where something else is in the way.

    Writes nothing: whatever else is wrong with the settings is found before a byte is touched.
    """
    out = config.out
    before = _config_at(out)
    finished = (out / MANIFEST).exists()
    if before is not None and not finished and not changed_settings(before, to_json(config)):
        return True  # also with --overwrite: the same command goes on
    if before is not None and not config.overwrite:
        if finished:
            raise OutputExistsError(f"{out} holds a finished run: choose another --out, or give --overwrite")
        sides = "; ".join(both_sides(before, to_json(config)))
        raise RunError(
            f"{out} holds an unfinished run of another config ({sides}): give the same, choose another --out, "
            "or give --overwrite"
        )
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        clear_output(out, False, "run", config.overwrite)
    return False


def prepare_run(config: TuneConfig) -> None:
    """Make way for a new run and write its config."""
    clear_output(config.out, _config_at(config.out) is not None, "run", config.overwrite)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / CONFIG, to_json(config))


def _config_at(out: Path) -> dict[str, Any] | None:
    """The config of the run at `out`; None where there is no run of litune (other tools write a config.json too)."""
    if not (out / CONFIG).is_file():
        return None
    config = read_json(out / CONFIG, RunError)
    return config if {"store", "text_tower", "batch_size"} <= config.keys() else None


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of `now` that are others in `before`, but for those that leave the result as it is."""
    neutral = ("overwrite", "out", "checkpoint_seconds")
    # A setting that an older litune did not have was as it is by default.
    before = to_json(TuneConfig(Path(), "", Path())) | before
    return {k: v for k, v in now.items() if before[k] != v and k not in neutral}


def both_sides(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What each of the `changed_settings` was and is, as clauses for a message."""
    return [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in changed_settings(before, now).items()]
