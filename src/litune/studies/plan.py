"""A TOML file → the runs of a comparison: rows of settings, seeds, and what is measured.

    title = "Which head"        optional
    seeds = [0, 1, 2]           every row is tuned with each of them
    metrics = ["zero_shot.…"]   the columns; by default R@1 and R@10 both ways and every set of classes
    [base]                      settings of every row: the fields of TuneConfig
    [[row]]                     one line of the table: its name, and what it sets besides [base] or instead
    [grid]                      lists of values: every row is run with each combination
    [eval]                      how rows are measured: the fields of EvalConfig, and under [eval.classes] sets of
                                classes by name; a row's own [row.eval] goes before it

Names of settings are written with '-' or '_'. Paths are relative to the file; towers and tokenizers are named as
on the command line.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litune.config import Config, EvalConfig, TuneConfig
from litune.errors import ConfigError, nearest
from litune.files import read_text
from litune.settings import Setting, settings_of

RETRIEVAL, ZERO_SHOT = "retrieval", "zero_shot."
DIRECTIONS = ("text_to_image", "image_to_text")

# What the command sets itself, and what to write instead.
NOT_IN_ROWS = {
    "seed": "list them as seeds = [0, 1, 2] at the top of the file",
    "out": "every run has its own folder under --out",
    "overwrite": "give --overwrite on the command line",
}
OF_SUITES = (
    "others", "tasks", "data", "features", "template_set", "canonical", "text_precision", "kshot", "probes",
    "calibration", "contamination", "out", "overwrite", "by_lang",
)  # fmt: skip
NOT_IN_EVAL = {
    "run": "every row's own runs are measured",
    "json": "results are written under --out",
    **dict.fromkeys(OF_SUITES, "a comparison measures retrieval and class folders: run litune eval on its run folders"),
}


@dataclass(frozen=True)
class Outline:
    """What stands at the top of a file."""

    title: str = ""
    seeds: tuple[int, ...] = (0,)
    metrics: tuple[str, ...] = ()
    base: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    row: tuple[dict[str, Any], ...] = ()
    grid: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table: its name, and its settings and measures as they stand in the file."""

    name: str
    settings: dict[str, Any]
    eval: dict[str, Any]

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name: lower case, with a hyphen for all that is not a letter or digit.

        Where it has a locking's letters, u is u0, to be told from U.

        >>> Row("Linear head, λ = 0.5", {}, {}).slug, Row("UU", {}, {}).slug, Row("Uu", {}, {}).slug
        ('linear-head-λ-0.5', 'uu', 'uu0')
        """
        name = re.sub(r"\b[LUu]{2}\b", lambda letters: letters[0].replace("u", "u0"), self.name)
        return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.")


@dataclass(frozen=True)
class Run:
    """One row with one seed: how it is tuned and, by what is measured, how it is evaluated."""

    row: str
    tune: TuneConfig
    evaluations: dict[str, EvalConfig]


@dataclass(frozen=True)
class Plan:
    """All that a file asks for; `runs` go through every row before they take the next seed."""

    title: str
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]


def read_plan(file: Path, out: Path) -> Plan:
    """The plan in `file`, its runs in folders under `out`. Raises `ConfigError` that names the row that is wrong."""
    if not file.is_file():
        raise ConfigError(f"there is no file {file}: give a TOML file of settings")
    try:
        table = tomllib.loads(read_text(file))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as why:
        raise ConfigError(f"{file} is not valid TOML ({why}): mend it") from None
    root = file.parent.resolve()
    outline = Outline(**read_settings(Outline, table, root, str(file)))
    seeds = outline.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"{file}: seeds is {list(seeds)}, it must be a list of different numbers, none negative")
    read_settings(TuneConfig, outline.base, root, f"{file}: [base]", NOT_IN_ROWS)
    rows = tuple(make_rows(outline, file))
    runs = tuple(make_run(row, seed, out, root, f"{file}: row {row.name!r}") for seed in seeds for row in rows)
    sets = list(dict.fromkeys(name for run in runs for name in run.evaluations if name != RETRIEVAL))
    recalls = [f"{way}.recall@{k}" for way in DIRECTIONS for k in (1, 5, 10)]
    known = recalls + [name + figure for name in sets for figure in ("", ".mean_per_class", ".top5")]
    for metric in outline.metrics:
        if metric not in known:
            raise ConfigError(f"{file}: there is no metric {metric!r}: {nearest(metric, known)}")
    metrics = outline.metrics or tuple([name for name in recalls if not name.endswith("@5")] + sets)
    return Plan(outline.title, seeds, metrics, rows, runs)


def make_rows(outline: Outline, file: Path) -> Iterator[Row]:
    """Every row of the file, with every combination of the grid's values."""
    base, grid = spelled(outline.base), spelled(outline.grid)
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{file}: [grid] {name} is {values!r}, it must be a list of values")
    folders: dict[str, str] = {}
    for given in outline.row or ({},):
        own = {key: value for key, value in spelled(given).items() if key not in ("name", "eval")}
        if both := own.keys() & grid.keys():
            raise ConfigError(f"{file}: {min(both)} stands in [grid] and in a [[row]]: leave it in one of them")
        title = given.get("name", describe(own))
        measures = given.get("eval", {})
        if not isinstance(title, str) or not isinstance(measures, dict):
            raise ConfigError(f"{file}: row {title!r}: its name must be text and its eval a table")
        classes = outline.eval.get("classes", {}), measures.get("classes", {})
        if not all(isinstance(paths, dict) for paths in classes):
            raise ConfigError(f"{file}: row {title!r}: eval.classes must be a table: a name and a path for each set")
        measures = spelled(outline.eval) | spelled(measures) | {"classes": classes[0] | classes[1]}
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            row = Row(", ".join(filter(None, (title, describe(chosen)))) or "base", base | own | chosen, measures)
            if not row.slug or row.slug in folders:
                other = f"is too like {folders[row.slug]!r}" if row.slug else "has no letter"
                raise ConfigError(f"{file}: the row name {row.name!r} {other}: each row needs a folder of its own")
            folders[row.slug] = row.name
            yield row


def make_run(row: Row, seed: int, out: Path, root: Path, where: str) -> Run:
    """The row with this seed, as configs. Raises `ConfigError` that begins with `where`."""
    settings = read_settings(TuneConfig, row.settings, root, where, NOT_IN_ROWS)
    tune = build(TuneConfig, settings | {"out": out / f"{row.slug}-{seed}", "seed": seed}, where)
    return Run(row.name, tune, make_evaluations(row, tune, root, where))


def make_evaluations(row: Row, tune: TuneConfig, root: Path, where: str) -> dict[str, EvalConfig]:
    """How a run is evaluated: retrieval, by default on its own held-out split, and every set of classes."""
    measures = {key: value for key, value in row.eval.items() if key != "classes"}
    settings = read_settings(EvalConfig, measures, root, where, NOT_IN_EVAL)
    settings = {"store": tune.store, "lang": tune.lang, "device": tune.device} | settings
    if settings["store"] == tune.store:
        settings = {"split": tune.val_split} | settings  # never by default on the pairs tuned on
    retrieval = build(EvalConfig, settings | {"run": tune.out}, where)
    evaluations = {RETRIEVAL: retrieval}
    setting = next(setting for setting in settings_of(EvalConfig) if setting.name == "classes")
    for name, path in row.eval["classes"].items():
        classes = read_setting(setting, path, root, f"{where}: eval.classes.{name}")
        evaluations[ZERO_SHOT + name] = dataclasses.replace(retrieval, classes=classes, store=None, split=None, lang=())
    return evaluations


def build(kind: type[Config], settings: dict[str, Any], where: str) -> Config:
    """The config with these settings. Raises `ConfigError` that begins with `where`."""
    for setting in settings_of(kind):
        if setting.required and setting.name not in settings:
            raise ConfigError(f"{where}: {setting.name} is not set: give it in [base] or in the row")
    try:
        return kind(**settings)
    except ConfigError as why:
        raise ConfigError(f"{where}: {why}") from None


def read_settings(
    kind: type[Any], table: dict[str, Any], root: Path, where: str, refused: dict[str, str] | None = None
) -> dict[str, Any]:
    """The settings in `table` as the fields of a dataclass `kind` want them: paths from `root` on, lists as tuples.

    Raises `ConfigError` for a setting that `kind` does not have, that is `refused`, or that has another type.
    """
    refused = refused or {}
    known = {setting.name: setting for setting in settings_of(kind) if setting.name not in refused}
    for name in spelled(table):
        if name in refused:
            raise ConfigError(f"{where}: {name} is not set here: {refused[name]}")
        if name not in known:
            raise ConfigError(f"{where}: there is no setting {name!r}: {nearest(name, known)}")
    return {name: read_setting(known[name], value, root, f"{where}: {name}") for name, value in spelled(table).items()}


def read_setting(setting: Setting, value: Any, root: Path, where: str) -> Any:
    """A TOML value as the setting has it. Raises `ConfigError` for another type and for a path that does not exist."""
    plain = setting.read(value, where)
    if setting.kind is not Path:
        return plain
    for path in plain if setting.several else (plain,):
        if not (root / path).exists():
            raise ConfigError(f"{where} is {str(path)!r}, but {root / path} does not exist")
    return tuple(root / path for path in plain) if setting.several else root / plain


def spelled(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings with their names as Python has them."""
    return {name.replace("-", "_"): value for name, value in settings.items()}


def describe(settings: dict[str, Any]) -> str:
    """Settings in words, as on the command line.

    >>> describe({"batch_size": 64, "lang": ["en", "de"]})
    'batch-size 64, lang en de'
    """
    parts = []
    for name, value in settings.items():
        words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(f"{name.replace('_', '-')} {words}")
    return ", ".join(parts)
