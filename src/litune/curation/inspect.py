"""What is in a set of pairs, as text, JSON and one page."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from litune.config import OverviewConfig, TuneConfig, command
from litune.curation.captions import words
from litune.curation.facts import gather, read_facts
from litune.curation.languages import identify
from litune.curation.overview import about_captions, about_files, about_tokens
from litune.curation.source import read_source
from litune.devices import processor_cores
from litune.errors import MissingExtraError, OutputExistsError
from litune.files import write_json
from litune.image.pictures import open_rgb
from litune.model.build import make_tokenizer, text_spec
from litune.pages import write_page
from litune.pairs.reference import names_of
from litune.progress import say

REPORT, PAGE = "overview.json", "overview.html"
SAMPLE = 20_000
"""Captions whose tokens are counted and whose language is identified."""


@command(OverviewConfig)
def inspect_data(config: OverviewConfig) -> dict[str, Any]:
    """Figures about the pairs, as plain values. Raises `DataError` for pairs that can't be read."""
    if config.out is not None and (config.out / REPORT).exists() and not config.overwrite:
        raise OutputExistsError(f"{config.out} holds an overview: choose another --out, or give --overwrite")
    pairs = read_source(config).pairs
    random = np.random.default_rng(config.seed)
    rows = np.arange(len(pairs))
    if 0 < config.sample < len(rows):
        rows = np.sort(random.choice(rows, config.sample, replace=False))
    flat = pairs.table["captions"].combine_chunks().flatten()
    sampled = flat.take(pa.array(np.sort(random.permutation(len(flat))[:SAMPLE]))).to_pylist()
    files = _facts(config, pairs.table, rows, pairs.fingerprint())
    figures = {
        "source": pairs.source,
        "images": len(pairs),
        "skipped_inputs": len(pairs.damaged),
        "skipped_examples": {damage.key: damage.reason for damage in pairs.damaged[:20]},
        **{name: _counts(pairs.table, name) for name in ("split", "label") if name in pairs.table.column_names},
        "captions": about_captions(pairs.table),
        "languages": _languages(pairs.table, sampled),
        "fields": _counts(pairs.table, "fields"),
        "tokens": _tokens(config, sampled),
        "files": about_files(files),
    }
    if config.out is not None:
        _write_page(config, figures, pairs.table, random)
        write_json(config.out / REPORT, figures)
        shutil.rmtree(_work_folder(config.out), ignore_errors=True)
        say(f"wrote {config.out / PAGE} and {REPORT}")
    return figures


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    """How often each value stands in a column, the most frequent first."""
    if column not in table.column_names:
        return {}
    values = table[column].combine_chunks()
    values = values.flatten() if pa.types.is_list(values.type) else values
    return dict(Counter(str(value) for value in values.to_pylist()).most_common())


def _languages(table: pa.Table, captions: list[str]) -> dict[str, Any]:
    """The languages that the table declares, and those identified of some captions, of three words at least."""
    languages: dict[str, Any] = {"declared": _counts(table, "langs"), "captions_counted": len(captions)}
    long = words(pa.array(captions, pa.string())) >= 3
    captions = [caption for caption, enough in zip(captions, long, strict=True) if enough]
    languages["too_short"] = languages["captions_counted"] - len(captions)
    try:
        identified = Counter(code for code, _ in identify(captions))
    except MissingExtraError as why:
        return languages | {"note": str(why)}
    seldom = max(1, len(captions) // 1000)  # of short captions some are always taken for another language
    named = {code: count for code, count in identified.most_common(12) if count > seldom}
    others = sum(identified.values()) - sum(named.values())
    return languages | {"identified": named | ({"others": others} if others else {})}


def _with_short(languages: dict[str, Any]) -> dict[str, int]:
    """The captions of each identified language, and those that are too short to tell."""
    identified: dict[str, int] = languages.get("identified", {})
    short = languages["too_short"]
    return identified | ({"too short to tell": short} if identified and short else {})


def _tokens(config: OverviewConfig, captions: list[str]) -> dict[str, Any]:
    if config.tokenizer == "none" or not captions:
        return {}
    # Its own limit is lifted, so that what would be cut can be counted.
    tune = TuneConfig(store=Path(), text_tower=config.tokenizer, out=Path(), max_tokens=100_000)
    try:
        lengths = make_tokenizer(text_spec(tune), tune, captions)(captions).lengths
    except MissingExtraError as why:
        return {"note": str(why)}
    return {"tokenizer": config.tokenizer, "max_tokens": config.max_tokens} | about_tokens(lengths, config.max_tokens)


def _work_folder(out: Path) -> Path:
    return out / "work"


def _facts(config: OverviewConfig, table: pa.Table, rows: np.ndarray, fingerprint: str) -> pa.Table:
    """Facts of the images at these rows, with their key; kept beside the page while they are gathered."""
    keys, paths = table["key"], table["path"]
    about = {"pairs": fingerprint, "sample": config.sample, "seed": config.seed, "verify": config.verify}
    with tempfile.TemporaryDirectory() as folder:
        parts = gather(
            lambda row: read_facts(paths[row].as_py(), content=True, look=open_rgb if config.verify else None),
            rows.tolist(),
            (_work_folder(config.out) if config.out is not None else Path(folder)),
            about,
            what="verifying images" if config.verify else "reading images",
            workers=config.workers or processor_cores(),
            keys=names_of(keys, paths),
            max_damaged=1.0,  # what is damaged is part of the answer
        )
        facts = pa.concat_tables(parts)
    return facts.append_column("key", keys.take(pa.array(rows))).append_column("path", paths.take(pa.array(rows)))


def _write_page(config: OverviewConfig, report: dict[str, Any], table: pa.Table, random: np.random.Generator) -> None:
    """The figures as tiles, bars and tables, and pictures drawn at random with one caption each."""
    assert config.out is not None
    captions, files, tokens, languages = (report[name] for name in ("captions", "files", "tokens", "languages"))
    distributions = [
        ("Words in a caption", captions["words_histogram"]),
        (f"Tokens of {tokens.get('tokenizer', '')}", tokens.get("tokens_histogram", {})),
        ("Short side, pixels", files["short_side_histogram"]),
        ("Languages as declared", languages["declared"]),
        ("Languages as identified", _with_short(languages)),
        ("Splits", report.get("split", {})),
        ("Text fields", report["fields"]),
        ("Classes", dict(list(report.get("label", {}).items())[:20])),
        ("Formats", files["formats"]),
    ]
    repeated = [(text, f"{count:,}") for text, count in captions["most_repeated"].items()]
    equal = [(", ".join(keys[:6]), f"{len(keys):,}") for keys in files["equal_examples"]]
    tables = [
        ("Captions on several images", ["caption", "times"], repeated),
        ("Equal files", ["files", "how many"], equal),
        ("Damaged images", ["what", "why"], list(files["damaged_examples"].items())),
        ("Skipped", ["what", "why"], list(report["skipped_examples"].items())),
    ]
    chosen = np.sort(random.permutation(len(table))[: config.pictures])
    examples = table.take(pa.array(chosen)).to_pylist()
    write_page(
        config.out / PAGE,
        "overview.html",
        title=f"Pairs: {Path(config.pairs).name}",
        intro=report["source"],
        report=report,
        captions=captions,
        files=files,
        tokens=tokens,
        distributions=distributions,
        tables=tables,
        pictures=[(row["path"], str(random.choice(row["captions"] or [row["key"]]))) for row in examples],
    )
