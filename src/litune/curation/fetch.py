"""URL lists → webdataset shards, by img2dataset in its own process, and a report of the dead links."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from litune.claims import claim
from litune.config import FetchConfig, command
from litune.curation import fetch_worker
from litune.devices import processor_cores
from litune.errors import ConfigError, DataError, MissingExtraError, OutputExistsError
from litune.files import atomic, clear_output, read_json, sha256_file, write_json, write_text
from litune.pairs.address import is_url, open_text
from litune.pairs.sample import CAPTION_COLUMNS, URL_COLUMNS, Damage, first_column, pick_column
from litune.pairs.tables import read_lines
from litune.progress import say, track

ABOUT = "fetch"
"""The output's folder for everything but shards: img2dataset takes any JSON file beside them for its own."""
ROWS = 20_000
LOOK = "import importlib.util as u; print(u.find_spec('img2dataset') is not None)"
POLL_SECONDS = 0.5
ADDRESS = re.compile(r"https?://[^\s/]\S*", re.IGNORECASE)
RESERVED = {"key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message"}
REASONS = (
    (r"Redirection to url .* is not allowed|unknown url type", "redirected to what is not http"),
    (r"HTTP Error (\d+)(?:: ?(.*))?$", r"HTTP \1 \2"),
    (r"timed? ?out", "no answer in time"),
    (r"infinite loop", "redirected in a circle"),
    (r"larger than \d+ bytes", "too large"),
    (r"too slow", "too slow"),
    (r"ended too early|IncompleteRead", "ended too early"),
    (r"X-Robots-Tag", "not to be used, the server says (X-Robots-Tag)"),
    (r"decod|cannot identify", "not an image"),
    (r"Name or service not known|getaddrinfo|nodename|name resolution", "no such host"),
    (r"Connection refused", "connection refused"),
    (r"Connection reset|Remote end closed|Broken pipe", "connection lost"),
    (r"CERTIFICATE|SSL", "bad certificate"),
)
"""Patterns of img2dataset's messages and the reasons they are counted under; others are counted verbatim."""


@command(FetchConfig)
def fetch_data(config: FetchConfig) -> dict[str, Any]:
    """Fetch the images of a list of URLs; returns the report, which is written to `config.out`/fetch as well.

    Resumes an interrupted run. Raises `DataError` for a list that can't be read, `MissingExtraError`
    where img2dataset is not installed, `OutputExistsError` where the output is of another list or other settings,
    `OutputBusyError` where another process writes it.
    """
    python = _find_img2dataset(config.python)
    with claim(config.out):
        return _fetch(config, python)


def _fetch(config: FetchConfig, python: str) -> dict[str, Any]:
    about = config.out / ABOUT
    names = ("image_size", "shard_size", "url_column", "caption_column")
    settings = {name: getattr(config, name) for name in names} | {"urls": str(config.urls), "keep": list(config.keep)}
    if not is_url(config.urls) and Path(config.urls).is_file():
        settings["sha256"] = sha256_file(Path(config.urls))
    if (about / "settings.json").exists() and not config.overwrite:
        saved = read_json(about / "settings.json", DataError)
        _check_same(config, saved, settings)
    else:
        # A run that ended while it wrote the list left nothing worth keeping.
        barely_begun = (
            about.is_dir() and list(config.out.iterdir()) == [about] and not (about / "settings.json").exists()
        )
        clear_output(config.out, about.is_dir(), "fetched set", config.overwrite or barely_begun)
        columns, refused = _write_list(config, about / "urls.parquet")
        saved = settings | {"columns": columns, "refused": refused}
        write_json(about / "settings.json", saved)
    _download(config, python, saved["columns"], about)
    report = _report(config.out, saved["refused"])
    write_json(about / "link-rot.json", report)
    write_text(about / "link-rot.txt", report_text(report))
    say(report_text(report).rstrip())
    say(f"wrote {config.out}: embed it with  litune embed {config.out} …; the report is in {about}/link-rot.json")
    return report


def _find_img2dataset(python: Path | None) -> str:
    """The path of a Python that has img2dataset."""
    chosen = str(python or sys.executable)
    try:
        result = subprocess.run([chosen, "-c", LOOK], capture_output=True, text=True, check=False)
    except OSError as why:
        raise DataError(f"--python {chosen} can't be started: {why.strerror}") from None
    if result.stdout.strip() == "True":
        return chosen
    if python is not None:
        raise DataError(f"--python {python} has no img2dataset: run  {python} -m pip install img2dataset")
    raise MissingExtraError("litune data fetch", "img2dataset", "fetch")


def _check_same(config: FetchConfig, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if saved.get(name) != value:
            what = f"--{name.replace('_', '-')} {saved.get(name)}, not {value}"
            if name in ("urls", "sha256"):
                what = f"another list ({saved.get('urls')})"
            raise OutputExistsError(f"{config.out} was begun with {what}: choose another --out, or give --overwrite")


def _write_list(config: FetchConfig, file: Path) -> tuple[list[str], dict[str, int]]:
    """Write the list in img2dataset's form, block by block; returns its columns, and the skipped rows by reason."""
    refused: Counter[str] = Counter()
    rows = _rows(config, refused)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{config.urls} has no http address: expected one URL per row")
    number = (int, float)
    schema = pa.schema([(n, pa.float64() if isinstance(v, number) else pa.string()) for n, v in first.items()])
    rows = itertools.chain([first], rows)
    with atomic(file) as temporary, pa.parquet.ParquetWriter(temporary, schema) as writer:
        while part := list(itertools.islice(rows, ROWS)):
            table = [{field.name: _cell(row[field.name], field.type) for field in schema} for row in part]
            writer.write_table(pa.Table.from_pylist(table, schema))
    return schema.names, dict(refused)


def _cell(value: Any, kind: pa.DataType) -> Any:
    """A value converted to its column's type; None where it can't be."""
    if pa.types.is_floating(kind):
        return float(value) if isinstance(value, (int, float)) else None
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _rows(config: FetchConfig, refused: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of the list: url, caption if there is one, and columns to keep; skipped rows are counted in `refused`.

    Only http addresses are passed on: img2dataset would read file:///etc/passwd.
    """
    url = caption = None
    keep: dict[str, str] = {}
    for line in _read_list(str(config.urls)):
        if isinstance(line, Damage):
            refused["the row can't be read"] += 1
            continue
        cells = line[1]
        if url is None:
            names = list(cells)
            wanted = None if config.url_column == FetchConfig.url_column else config.url_column
            url = pick_column(str(config.urls), names, wanted, URL_COLUMNS, "--url-column URLs")
            caption = first_column(names, CAPTION_COLUMNS)
            if config.caption_column is not None:
                caption = pick_column(str(config.urls), names, config.caption_column, [], "--caption-column captions")
            for name in config.keep:
                if name in RESERVED:
                    raise ConfigError(f"--keep {name}: img2dataset writes a {name} of its own; rename the column")
                keep[name] = pick_column(str(config.urls), names, name, [], "--keep columns")
        address = cells.get(url)
        if not isinstance(address, str) or not ADDRESS.fullmatch(address.strip()):
            refused["no http address"] += 1
            continue
        row = {"url": address.strip()}
        if caption is not None:
            row["caption"] = cells.get(caption) or ""
        yield row | {name: cells.get(column) for name, column in keep.items()}


def _read_list(address: str) -> Iterator[tuple[str, dict[str, Any]] | Damage]:
    """The rows of a table, or the lines of a text file."""
    if PurePosixPath(address).suffix.lower() != ".txt":
        yield from read_lines(address)
        return
    try:
        with open_text(address) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number}", {"url": line.strip()}
    except OSError as why:
        raise DataError(f"{address} can't be read: {why.strerror or why}") from None


def _download(config: FetchConfig, python: str, columns: list[str], about: Path) -> None:
    """Run img2dataset on the shards that are not done yet, and show its progress."""
    settings = {
        "url_list": str((about / "urls.parquet").absolute()),
        "input_format": "parquet",
        "output_folder": str(config.out.absolute()),
        "output_format": "webdataset",
        "caption_col": "caption" if "caption" in columns else None,
        "save_additional_columns": [name for name in columns if name not in ("url", "caption")] or None,
        "image_size": config.image_size or 256,
        "resize_mode": "keep_ratio" if config.image_size else "no",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "disable_all_reencoding": not config.image_size,
        "thread_count": config.threads,
        "processes_count": config.processes or processor_cores(),
        "number_sample_per_shard": config.shard_size,
        "timeout": config.timeout,
        "retries": config.retries,
        "user_agent_token": "litune",
        "extract_exif": False,
    }
    write_json(about / "img2dataset.json", settings)
    limits = {"most_bytes": config.most_bytes, "seconds": config.seconds}
    # Only the list's own addresses may be requested.
    quiet = {"WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"}
    environment = os.environ | quiet | {fetch_worker.LIMITS: json.dumps(limits)}
    rows = pa.parquet.read_metadata(about / "urls.parquet").num_rows
    done = sum(stats["count"] for stats in _shard_stats(config.out))
    if done:
        say(f"going on with {config.out}: {done:,} of {rows:,} URLs are done")
    if done == rows:
        return
    arguments = [python, fetch_worker.__file__, str(about / "img2dataset.json")]
    with open(about / "img2dataset.log", "ab") as log:
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            with track("fetching", "URLs", rows, done) as task:
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    task.advance(sum(stats["count"] for stats in _shard_stats(config.out)) - task.done)
                task.advance(sum(stats["count"] for stats in _shard_stats(config.out)) - task.done)
        finally:
            process.terminate()
            process.wait()
    if task.done < rows:
        raise DataError(
            f"img2dataset ended with {task.done:,} of {rows:,} URLs done (it says why in {about}/img2dataset.log): "
            "the same command goes on"
        )


def _shard_stats(out: Path) -> list[dict[str, Any]]:
    """img2dataset's statistics of each finished shard."""
    stats = []
    for file in sorted(out.glob("*_stats.json")):
        with suppress(ValueError):  # it is being written
            stats.append(json.loads(file.read_text(encoding="utf-8")))
    return stats


def _report(out: Path, refused: dict[str, int]) -> dict[str, Any]:
    """The number of URLs, of images fetched, and why the others failed."""
    reasons = Counter(refused)
    fetched = urls = 0
    for stats in _shard_stats(out):
        urls += stats["count"]
        fetched += stats["successes"]
        for message, count in stats["status_dict"].items():
            if message != "success":
                reasons[reason_of(message)] += count
    urls += sum(refused.values())
    return {
        "urls": urls,
        "fetched": fetched,
        "lost": urls - fetched,
        "share_lost": (urls - fetched) / urls if urls else 0.0,
        "reasons": dict(reasons.most_common()),
    }


def reason_of(message: str) -> str:
    """The reason to count one of img2dataset's messages under.

    >>> reason_of("HTTP Error 404: Not Found"), reason_of("<urlopen error timed out>")
    ('HTTP 404 Not Found', 'no answer in time')
    """
    for pattern, reason in REASONS:
        if match := re.search(pattern, message, re.IGNORECASE):
            return match.expand(reason).strip()
    return (message.splitlines() or [""])[0][:100] or "unknown"


def report_text(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [f"{report['fetched']:,} of {report['urls']:,} images fetched, {report['share_lost']:.1%} lost"]
    lines += [f"{count:>12,}  {reason}" for reason, count in report["reasons"].items()]
    return "\n".join(lines) + "\n"
