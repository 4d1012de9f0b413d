"""Pairs → those that pass the rules."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.claims import claim
from litune.config import FilterConfig, command, to_json
from litune.curation import captions as text
from litune.curation.facts import gather, read_facts
from litune.curation.languages import check_languages, identify
from litune.curation.rules import Pool, Rule, apply, dropped
from litune.curation.source import SourcePairs, read_source, write_store
from litune.devices import processor_cores
from litune.errors import ConfigError, DataError, OutputExistsError
from litune.files import check_file, clear_output, write_json
from litune.pairs.reference import names_of
from litune.pairs.stores import is_store
from litune.pairs.write import check_table, reading, write_pairs, write_table
from litune.progress import say, track
from litune.store.store import MANIFEST

PRESETS: dict[str, dict[str, Any]] = {
    # The LiT paper's processing of YFCC100M's texts (arXiv 2111.07991).
    "yfcc": {"caption_column": ("title", "description", "tags"), "titles": "yfcc", "tags": "shuffle"},
    # Section 3 of ALIGN (arXiv 2102.05918), without its filter of adult images.
    "align": {
        "min_side": 201,
        "max_aspect": 3.0,
        "max_captions": 1000,
        "max_repeats": 10,
        "vocabulary": 100_000_000,
        "min_words": 3,
        "max_words": 20,
    },
    # The LiT paper: ALIGN's image filters, and a simpler text filter that it does not describe.
    "lit": {"min_side": 201, "max_aspect": 3.0, "max_captions": 1000, "min_words": 1},
}


@command(FilterConfig)
def filter_data(config: FilterConfig) -> dict[str, Any]:
    """Write the pairs that pass all rules of `config`; returns what each rule dropped.

    Raises `ConfigError` where no rule is set, `DataError` for unusable pairs or where nothing would be left,
    `OutputExistsError` for an output that is there, `OutputBusyError` where another process writes it.
    """
    config = with_preset(config)
    with claim(config.out):
        _check_outputs(config)
        return _filter(config)


def _filter(config: FilterConfig) -> dict[str, Any]:
    source = read_source(config)
    pool = Pool(source.pairs.table)
    rules = [rule for make in RULES for rule in make(config, source)]
    if not rules and config.tags != "shuffle":
        raise ConfigError("no rule is set: give --preset, or rules such as --min-side 200 --min-words 3")
    outcomes = list(apply(pool, rules))
    if not len(pool.images_left):
        raise DataError(f"the rules drop all {len(pool.table):,} images: loosen them")
    table = pool.kept()
    if config.tags == "shuffle":
        table = _shuffle_tags(table, config)
    results = {
        "source": source.pairs.source,
        "images": len(pool.table),
        "captions": len(pool.captions),
        "kept_images": len(table),
        "kept_captions": int(pc.sum(pc.list_value_length(table["captions"])).as_py() or 0),
        "rules": outcomes,
        "settings": to_json(config),
    }
    if config.dropped is not None:
        write_table(config.dropped, dropped(pool, rules))
    if config.report is not None:
        write_json(config.report, results)
    how = ""
    if source.store is not None and not config.out.suffix:
        clear_output(config.out, (config.out / MANIFEST).exists(), "feature store", config.overwrite)
        write_store(config.out, source, pool.images_left, table)
    else:
        write_pairs(config.out, table)
        how = reading(table)
    shutil.rmtree(_work_folder(config.out), ignore_errors=True)
    say(f"wrote {config.out}: {results['kept_images']:,} images, {results['kept_captions']:,} captions{how}")
    return results


def with_preset(config: FilterConfig) -> FilterConfig:
    """The settings, with the preset's values for those that are not given."""
    if config.preset is None:
        return config
    given = {name: value for name in PRESETS[config.preset] if (value := getattr(config, name)) not in (None, ())}
    return dataclasses.replace(config, **(PRESETS[config.preset] | given))


def _check_outputs(config: FilterConfig) -> None:
    if config.out.suffix:
        check_table(config.out, "--out", config.overwrite)
    elif not is_store(config.pairs):
        raise ConfigError(f"--out {config.out}: name a table (.parquet, .jsonl, .csv); stores are made of stores alone")
    elif config.out.exists() and not config.overwrite:
        raise OutputExistsError(f"{config.out} exists: choose another --out, or give --overwrite")
    if config.dropped is not None:
        check_table(config.dropped, "--dropped", config.overwrite)
    check_file(config.report, "--report", config.overwrite)
    if config.agree is not None and not is_store(config.pairs):
        raise ConfigError(f"--agree reads images' features: embed {config.pairs} and give the store as PAIRS")
    if config.languages:
        check_languages(config.languages)


def _work_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.facts")


def _image_rules(config: FilterConfig, source: SourcePairs) -> list[Rule]:
    rules = []
    if config.min_side is not None or config.max_aspect is not None:
        size = _sizes(config, source)
        short, long = size.min(axis=1), size.max(axis=1)
        rules.append(Rule("readable", "images", lambda pool, rows: short[rows] > 0))
        if (least := config.min_side) is not None:
            rules.append(Rule(f"min-side {least}", "images", lambda pool, rows: short[rows] >= least))
        if (most := config.max_aspect) is not None:
            rules.append(Rule(f"max-aspect {most:g}", "images", lambda pool, rows: long[rows] <= most * short[rows]))
    if (limit := config.max_captions) is not None:

        def few(pool: Pool, rows: np.ndarray) -> np.ndarray:
            counts: np.ndarray = np.bincount(pool.owner, minlength=len(pool.table))[rows]
            return counts <= limit

        rules.append(Rule(f"max-captions {limit}", "images", few))
    return rules


def _sizes(config: FilterConfig, source: SourcePairs) -> np.ndarray:
    """Widths and heights [n, 2], from the store or from the files' headers; 0 for damaged images."""
    table = source.pairs.table
    if source.store is not None and {"width", "height"} <= set(source.store.metadata.column_names):
        sizes = [source.store.metadata[name].to_numpy()[source.rows] for name in ("width", "height")]
        return np.stack(sizes, axis=1)
    keys, paths = table["key"], table["path"]
    parts = gather(
        lambda row: read_facts(paths[row].as_py()),
        range(len(table)),
        _work_folder(config.out),
        {"pairs": source.pairs.fingerprint()},
        what="reading sizes",
        workers=config.workers or processor_cores(),
        keys=names_of(keys, paths),
        max_damaged=config.max_damaged,
    )
    sizes = [np.stack([part[name].to_numpy() for name in ("width", "height")], axis=1) for part in parts]
    return np.concatenate(sizes)


def _caption_rules(config: FilterConfig, source: SourcePairs) -> list[Rule]:
    rules = []

    def add(name: str, passes: Callable[[pa.Array], np.ndarray]) -> None:
        rules.append(Rule(name, "captions", lambda pool, rows: passes(pool.captions.take(pa.array(rows)))))

    if config.titles == "yfcc":
        rules.append(Rule("titles yfcc", "captions", _titles(config.title_field)))
    if config.boilerplate == "drop":
        counts = pc.list_value_length(source.pairs.table["captions"])
        if source.pairs.captions and pc.min(counts).as_py() == 0:
            rules.append(Rule("no caption", "images", lambda pool, rows: np.isin(rows, pool.owner)))
        add("boilerplate", lambda captions: ~text.is_boilerplate(captions))
    for name, measure in (("chars", text.characters), ("words", text.words)):
        for way in ("min", "max"):
            limit = getattr(config, f"{way}_{name}")
            if limit is not None:
                add(f"{way}-{name} {limit}", _limit(measure, way, limit))
    if config.min_letters is not None:
        add(f"min-letters {config.min_letters:g}", _limit(text.letter_share, "min", config.min_letters))
    return rules


def _limit(measure: Callable[[pa.Array], np.ndarray], way: str, limit: float) -> Callable[[pa.Array], np.ndarray]:
    if way == "min":
        return lambda captions: measure(captions) >= limit
    return lambda captions: measure(captions) <= limit


def _titles(field: str) -> Callable[[Pool, np.ndarray], np.ndarray]:
    def keeps(pool: Pool, rows: np.ndarray) -> np.ndarray:
        keep = ~text.is_empty_title(pool.captions.take(pa.array(rows)))
        fields = pool.flat("fields")
        if fields is not None:
            keep |= pc.not_equal(fields.take(pa.array(rows)), field).to_numpy(zero_copy_only=False)
        return keep

    return keeps


def _set_rules(config: FilterConfig, source: SourcePairs) -> list[Rule]:
    """Rules that look at all remaining captions together."""
    rules = []
    if (most := config.max_repeats) is not None:

        def seldom(pool: Pool, rows: np.ndarray) -> np.ndarray:
            return text.repeated(pool.captions.take(pa.array(rows)), pool.owner[rows]) <= most

        rules.append(Rule(f"max-repeats {most}", "captions", seldom))
    if (size := config.vocabulary) is not None:

        def common(pool: Pool, rows: np.ndarray) -> np.ndarray:
            return ~text.rare(pool.captions.take(pa.array(rows)), size)

        rules.append(Rule(f"vocabulary {size}", "captions", common))
    return rules


def _language_rules(config: FilterConfig, source: SourcePairs) -> list[Rule]:
    if not config.languages:
        return []

    def keeps(pool: Pool, rows: np.ndarray) -> np.ndarray:
        keep = np.zeros(len(rows), bool)
        with track("identifying languages", "captions", len(rows)) as task:
            languages = identify(pool.captions[int(row)].as_py() for row in rows)
            for position, (code, certainty) in enumerate(languages):
                keep[position] = code in config.languages and certainty >= config.min_certainty
                task.advance(1)
        return keep

    return [Rule("languages " + " ".join(config.languages), "captions", keeps)]


def _agreement_rules(config: FilterConfig, source: SourcePairs) -> list[Rule]:
    if config.agree is None or config.min_agreement is None:
        return []
    least = config.min_agreement

    def keeps(pool: Pool, rows: np.ndarray) -> np.ndarray:
        agreeing: np.ndarray = _cosines(config, source, pool, rows) >= least
        return agreeing

    return [Rule(f"min-agreement {least:g}", "captions", keeps)]


def _cosines(config: FilterConfig, source: SourcePairs, pool: Pool, rows: np.ndarray, block: int = 4096) -> np.ndarray:
    """The cosine of each of these captions with its image, by the run's model."""
    from litune.model.run_folder import check_store, load

    assert config.agree is not None
    assert source.store is not None
    assert source.rows is not None
    model = load(config.agree, device=config.device)
    check_store(config.agree, model, source.store.made_with)
    cosines = np.empty(len(rows), np.float32)
    with track("scoring agreement", "captions", len(rows)) as task:
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            images = model.encode_features(source.store.features(source.rows[pool.owner[part]]))
            texts = model.encode_text(pool.captions.take(pa.array(part)).to_pylist())
            cosines[start : start + len(part)] = (images * texts).sum(dim=1).float().cpu().numpy()
            task.advance(len(part))
    return cosines


RULES = (_image_rules, _caption_rules, _set_rules, _language_rules, _agreement_rules)
"""The rules in order: cheap ones first, so that the expensive ones have less to do."""


def _shuffle_tags(table: pa.Table, config: FilterConfig) -> pa.Table:
    """The table with tags joined to texts, in an order that depends on the seed and the image's key."""
    known = pc.unique(pc.list_flatten(table["fields"])).to_pylist() if "fields" in table.column_names else []
    if config.tags_field not in known:
        raise DataError(f"--tags shuffle: no caption is of the field {config.tags_field!r}: see --caption-column")
    rows = []
    for key, fields, captions in zip(*(table[name].to_pylist() for name in ("key", "fields", "captions")), strict=True):
        random = np.random.default_rng([config.seed, *key.encode()])
        rows.append(
            [
                text.shuffle_tags(caption, random) if field == config.tags_field else caption
                for field, caption in zip(fields, captions, strict=True)
            ]
        )
    return table.set_column(table.column_names.index("captions"), "captions", pa.array(rows, pa.list_(pa.string())))
