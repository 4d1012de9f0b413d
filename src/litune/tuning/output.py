"""What is at a run's --out: nothing, an unfinished run to go on with, or what has to make way for a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litune.config import TuneConfig, to_json
from litune.errors import OutputExistsError, RunError
from litune.files import clear_output, holds_nothing, read_json, write_json
from litune.model.run_folder import CONFIG, MANIFEST


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
    if before is None and out.exists() and (not out.is_dir() or not holds_nothing(out)):
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
