"""Reads pairs, images with their captions, from any kind of source into one table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.config import EmbedConfig, ReadingConfig
from litune.errors import DataError, nearest
from litune.pairs.cells import is_missing, texts_in
from litune.pairs.find import find_source, holds_pairs
from litune.pairs.folders import class_folders, image_files
from litune.pairs.reference import absolute
from litune.pairs.sample import Damage, Options, Sample, SampleSource, find_split, is_picture, say_passed_over
from litune.pairs.tables import join
from litune.pairs.trees import tree_splits, walk
from litune.progress import say

__all__ = ["Damage", "Pairs", "class_folders", "image_files", "read_pairs", "select_captions"]

ROWS = 20_000
"""The most samples held as Python objects before they become Arrow columns."""

MOST_FOLDERS = 1000
"""The most folders in which pictures are looked for that a table does not name."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Pairs:
    """Images with their captions, in a fixed order.

    `table` has one row per image: `key` (its name in the source), `path` (where its bytes are: a file or another
    reference, see `litune.pairs.reference`), `captions` (a list, possibly empty), and, where the source has them,
    `langs` and `fields` (one per caption: its language, and the column it came from), `split`, `label` (the
    class), `url` and the further columns asked for with `keep`.
    """

    table: pa.Table
    source: str
    damaged: tuple[Damage, ...] = ()
    note: str = ""
    """What else is to be said of the source."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def captions(self) -> int:
        """The number of captions of all images."""
        return int(pc.sum(pc.list_value_length(self.table["captions"])).as_py() or 0)

    def fingerprint(self) -> str:
        """A hash over all columns but the paths (keys, captions, languages, splits, labels …), in order."""
        digest = hashlib.sha256()
        for name in self.table.column_names:
            if name == "path":
                continue
            digest.update(name.encode())
            for chunk in self.table[name].chunks:
                # Values and lengths are hashed, not the Arrow buffers, which may hold more than the chunk's slice.
                flat = pc.list_flatten(chunk) if pa.types.is_list(chunk.type) else chunk
                for start in range(0, len(flat), ROWS):
                    part = flat.slice(start, ROWS).to_pylist()
                    digest.update(("\0" * (start > 0) + "\0".join("" if v is None else str(v) for v in part)).encode())
                if pa.types.is_list(chunk.type):
                    digest.update(pc.list_value_length(chunk).to_numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def read_pairs(
    source: Path | str,
    *,
    images: Path | str | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split_column: str = "split",
    lang_column: str = "lang",
    keep: Sequence[str] = (),
    split: Sequence[str] = (),
    lang: Sequence[str] = (),
    max_damaged: float = 0.01,
    out: Path | None = None,
) -> Pairs:
    """The pairs at `source`, whose kind is seen by looking at it (docs/sources.md has the list).

    Pictures are not read, nor is a table at `out`, which the command writes. Raises `DataError` where there is nothing
    to read, a column is missing, or more than the share `max_damaged` of the captions, or of the files that hold them,
    can't be used.
    """
    options = Options(images, image_column, caption_columns, split_column, lang_column, keep, out=out)
    pairs = collect(find_source(str(source), options), options, max_damaged)
    return _select(pairs, split, lang)


def pictures_at(address: str) -> list[str]:
    """The references of the pictures at an address: one picture's own, or those of the pairs that are there.

    Raises `DataError` where there are none.
    """
    return list(read_pairs(address).table["path"].to_pylist()) if holds_pairs(address) else [address]


def options_of(config: ReadingConfig | EmbedConfig, keep: Sequence[str] = ()) -> Options:
    """How a command's settings ask for pairs to be read."""
    lists = (config.caption_column, config.split_column, config.lang_column)
    return Options(config.images, config.image_column, *lists, keep)


def read_files(config: ReadingConfig | EmbedConfig, keep: Sequence[str] = ()) -> Pairs:
    """The pairs that a command's settings ask for; `keep` names further columns. Raises `DataError`."""
    return read_pairs(
        config.pairs,
        images=config.images,
        image_column=config.image_column,
        caption_columns=config.caption_column,
        split_column=config.split_column,
        lang_column=config.lang_column,
        keep=keep,
        split=config.split,
        lang=config.lang,
        max_damaged=config.max_damaged,
        out=getattr(config, "out", None),
    )


def say_pairs(pairs: Pairs) -> None:
    """Print the number of pairs, their source, what was skipped, and that all captions are the same."""
    say(f"pairs: {len(pairs):,} images, {pairs.captions:,} captions ({pairs.source})")
    if "split" in pairs.table.column_names and (without := pc.sum(pc.equal(pairs.table["split"], "")).as_py()):
        say(f"{without:,} images are in no split, their cells are empty: neither tuned nor evaluated on")
    texts = pc.list_flatten(pairs.table["captions"])
    if len(texts) > 1 and pc.all(pc.equal(texts, texts[0])).as_py():
        say(f"all captions are {texts[0].as_py()[:60]!r}: there is nothing to learn from them; see --caption-column")
    if pairs.note:
        say(pairs.note)
    if pairs.damaged:
        first = pairs.damaged[0]
        say(f"skipped {len(pairs.damaged):,} inputs that can't be used, first {first.key}: {first.reason}")


def collect(source: SampleSource, options: Options, max_damaged: float) -> Pairs:
    """All samples of a source as pairs, in order, without the damaged ones. Raises `DataError` for too many of them."""
    for about, flag in options.given.items():
        if about not in source.takes:
            raise DataError(f"{flag} means nothing for {source.name}, which has no such thing: leave it out")
    columns = _PairColumns(options)
    damaged: list[Damage] = []
    for sample in source.samples:
        if isinstance(sample, Damage):
            damaged.append(sample)
        else:
            damaged += columns.add(sample)
    for name in options.caption_columns:
        if columns.rows and name.lower() not in columns.named:
            raise DataError(f"--caption-column {name}: no image in {source.name} has such a text")
    for option, about in (("split", "split"), ("lang", "langs")):
        if option in options.given and columns.rows and about not in columns.seen:
            raise DataError(f"{options.given[option]} names nothing in {source.name}")
    _check_damage(source.name, damaged, columns.captions or columns.rows, source.files, max_damaged)
    if not columns.rows:
        raise DataError(f"{source.name} has no samples: expected images with captions")
    table = columns.table()
    base = ""
    if source.base is not None:
        table = _group(source.name, table)
        splits = tree_splits(table["path"].to_pylist())
        if "split" not in table.column_names and len(set(splits)) > 1:
            table = table.append_column("split", pa.array(splits, pa.string()))
        base = source.base(table["path"].to_pylist())
        paths = pa.array([join(base, path) for path in table["path"].to_pylist()], pa.string())
        table = table.set_column(table.column_names.index("path"), "path", paths)
    if source.base is not None or source.within is not None:
        source.notes["images that it does not name"] = _count_unnamed(table["path"].to_pylist(), source.within)
    if columns.captions:
        without = pc.equal(pc.list_value_length(table["captions"]), 0)
        source.notes["images without a caption"] = pc.sum(without).as_py()
    notes = [f"{count:,} {what}" for what, count in source.notes.items() if count]
    about = ", ".join([source.about(len(table)), *notes, *([f"images in {base}"] if base else [])])
    for name in options.keep:
        if name not in table.column_names:
            raise DataError(f"{source.name} has no {name!r} to keep: name another with --keep")
    return Pairs(table, about, tuple(damaged), say_passed_over(source.passed_over))


def _count_unnamed(paths: Sequence[str], within: Path | None) -> int:
    """The number of pictures that lie beside these, or `within` a folder, and are none of them.

    Pictures in more than `MOST_FOLDERS` folders are not looked for beside.
    """
    named: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = absolute(path).rpartition("/")
        named.setdefault(folder, set()).add(name)
    tree = {} if within is None else walk(within)
    listed: dict[str, Sequence[str]] = {absolute(f"{within}/{inside}"): names for inside, names in tree.items()}
    if len(named) <= MOST_FOLDERS:
        beside = (Path(folder) for folder in named if folder not in listed and Path(folder).is_dir())
        listed |= {str(folder): [file.name for file in folder.iterdir()] for folder in beside}
    return sum(is_picture(name) and name not in named.get(f, ()) for f, names in listed.items() for name in names)


def _check_damage(name: str, damaged: Sequence[Damage], good: int, files: int, max_damaged: float) -> None:
    remedy = "mend them or raise --max-damaged"
    if damaged and not good:
        raise DataError(f"{name} has no usable caption: {damaged[0].key}: {damaged[0].reason}")
    lost_files = [d for d in damaged if d.whole_file]
    if len(lost_files) > max_damaged * files:
        raise DataError(
            f"{len(lost_files):,} of {files:,} files in {name} can't be used (at most {max_damaged:.1%} may): "
            f"{lost_files[0].key}: {lost_files[0].reason}; {remedy}"
        )
    if len(damaged) > max_damaged * (good + len(damaged)):
        raise DataError(
            f"{len(damaged):,} of {good + len(damaged):,} inputs in {name} can't be used "
            f"(at most {max_damaged:.1%} may): {damaged[0].key}: {damaged[0].reason}; {remedy}"
        )


class _PairColumns:
    """Checks samples and collects them as Arrow columns, part by part."""

    def __init__(self, options: Options) -> None:
        self.rows = self.captions = 0
        self._kept = options.kept
        self._several = options.several_fields
        self._label = options.label_column or "label"
        self.seen: set[str] = set()
        self.named: set[str] = set()
        """The columns that there are, and the text fields that some sample has."""
        self._parts: list[pa.Table] = []
        self._clear()

    def _clear(self) -> None:
        self._lists: dict[str, list[list[str]]] = {"captions": [], "langs": [], "fields": []}
        self._texts: dict[str, list[str]] = {"key": [], "path": [], "split": [], "label": []}
        self._extra: dict[str, list[Any]] = {name: [] for name in self._kept}

    def add(self, sample: Sample) -> list[Damage]:
        """Add a sample and return the damage in it. One whose captions are all damaged is left out; none are fine."""
        damaged: list[Damage] = []
        for what, text in (("name", sample.key), ("path", sample.path)):
            reason = _reason(text) if isinstance(text, str) else f"is {text!r:.80}, expected a text"
            if reason or "\0" in text:
                return [Damage(_printable(sample.where), f"the image's {what} {reason or 'has a NUL character'}")]
        captions: list[tuple[str, str, str]] = []
        self.named |= {name.lower() for name in sample.texts}
        for field, cell in sample.texts.items():
            self._check(sample, field, cell, captions, damaged)
        if damaged and not captions:
            return damaged
        self._several |= len(sample.texts) > 1
        langs = [lang for _, _, lang in captions]
        split, label = "" if is_missing(sample.split) else _text(sample.split), _text(sample.label)
        self.seen |= {name for name, present in (("langs", any(langs)), ("split", split), ("label", label)) if present}
        for name, values in (
            ("captions", [c for c, _, _ in captions]),
            ("fields", [f for _, f, _ in captions]),
            ("langs", langs),
        ):
            self._lists[name].append(values)
        for name, value in (("key", str(sample.key)), ("path", sample.path), ("split", split), ("label", label)):
            self._texts[name].append(value)
        for name, extra in self._extra.items():
            extra.append(sample.extra.get(name))
        self.rows += 1
        self.captions += len(captions)
        if len(self._texts["key"]) >= ROWS:
            self._close_part()
        return damaged

    def _check(
        self, sample: Sample, field: str, cell: Any, captions: list[tuple[str, str, str]], damaged: list[Damage]
    ) -> None:
        """Add the captions in a cell that can be used, and the damage; nothing where the cell is empty."""
        lang = sample.lang.get(field, "") if isinstance(sample.lang, dict) else sample.lang
        parts = cell if isinstance(cell, list) and isinstance(lang, list) else [cell]
        langs = lang if isinstance(lang, list) else [lang] * len(parts)
        if len(langs) != len(parts):
            damaged.append(Damage(sample.where, f"{len(parts)} captions but {len(langs)} languages"))
            return
        for part, part_lang in zip(parts, langs, strict=True):
            # A class may be called None, and NA is Namibia.
            texts = [(part, "")] if field == self._label and isinstance(part, str) else texts_in(part)
            for caption, own_lang in texts:
                if isinstance(caption, bytes):
                    damaged.append(Damage(sample.where, "the caption is not UTF-8"))
                elif not isinstance(caption, str):
                    damaged.append(Damage(sample.where, f"the caption is {caption!r:.80}, expected a string"))
                elif reason := _reason(caption):
                    damaged.append(Damage(sample.where, f"the caption {reason}"))
                elif clean := _clean(caption):
                    captions.append((clean, field, own_lang or _text(part_lang)))

    def _close_part(self) -> None:
        columns: dict[str, pa.Array] = {name: pa.array(self._texts[name], pa.string()) for name in ("key", "path")}
        columns |= {name: pa.array(values, pa.list_(pa.string())) for name, values in self._lists.items()}
        columns |= {name: pa.array(self._texts[name], pa.string()) for name in ("split", "label")}
        columns |= {name: _metadata_column(values) for name, values in self._extra.items()}
        self._parts.append(pa.table(columns))
        self._clear()

    def table(self) -> pa.Table:
        """One row per sample; columns that are empty for all samples are left out."""
        if self._texts["key"]:
            self._close_part()
        several = {"fields"} if self._several else set()
        absent = {"langs", "split", "label", "fields"} - self.seen - several
        absent |= {name for name in self._extra if all(p[name].null_count == len(p) for p in self._parts)}
        names = [name for name in self._parts[0].column_names if name not in absent]
        # A column that has numbers in one part and texts in another becomes text.
        texts = {n for n in self._extra if n in names and any(pa.types.is_string(p[n].type) for p in self._parts)}
        parts = []
        for part in self._parts:
            for name in texts:
                index = part.column_names.index(name)
                part = part.set_column(index, name, part[name].cast(pa.string()))
            parts.append(part.select(names))
        return pa.concat_tables(parts, promote_options="permissive").combine_chunks()


def _reason(text: str) -> str:
    """Why a text can't be used as a name or a caption; empty if it can."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return ""


def _clean(caption: str) -> str:
    """A caption with control characters replaced by blanks and stripped; otherwise unchanged."""
    return (caption if caption.isprintable() else _CONTROL.sub(" ", caption)).strip()


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _text(value: Any) -> str:
    """A cell as text that can be stored; empty for None and NaN."""
    return "" if value is None or value != value else _clean(_printable(str(value)))


def _metadata_column(values: list[Any]) -> pa.Array:
    """A column of metadata: int64 or float64 if all values are numbers, else text."""
    present = [value for value in values if value is not None]
    try:
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present):
            return pa.array(values, pa.int64() if all(isinstance(value, int) for value in present) else pa.float64())
    except (pa.ArrowException, OverflowError):
        pass
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for v in values]
    return pa.array([None if text is None else _printable(text) for text in texts], pa.string())


def _group(name: str, table: pa.Table) -> pa.Table:
    """One row per image, in order of first appearance, with all its captions in the table's order."""
    images = table["path"].combine_chunks().dictionary_encode()
    if len(images.dictionary) == len(images):
        return table
    codes = images.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    first = order[np.concatenate([[0], np.cumsum(np.bincount(codes))])[:-1].astype(np.int64)]
    if "split" in table.column_names:
        splits = table["split"].combine_chunks().dictionary_encode().indices.to_numpy()
        mixed = np.flatnonzero(splits != splits[first][codes])
        if mixed.size:
            first_split, second_split = (table["split"][int(row)].as_py() for row in (first[codes[mixed[0]]], mixed[0]))
            image = table["path"][int(mixed[0])].as_py()
            raise DataError(
                f"{name}: the image {image} is in the splits {first_split!r} and {second_split!r}: keep it in one"
            )
    grouped = table.take(pa.array(first))
    for column in ("captions", "langs", "fields"):
        if column in table.column_names:
            lists = table[column].combine_chunks().take(pa.array(order))
            counts = np.bincount(codes, weights=pc.list_value_length(table[column]).to_numpy())
            offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
            lists = pa.ListArray.from_arrays(offsets, pc.list_flatten(lists))
            grouped = grouped.set_column(grouped.column_names.index(column), column, lists)
    return grouped


def _select(pairs: Pairs, split: Sequence[str], lang: Sequence[str]) -> Pairs:
    """Only the images of these splits and the captions in these languages; an empty list selects all."""
    table = pairs.table
    if split:
        known = _known(table, "split", split, "--split")
        table = table.filter(pc.is_in(table["split"], pa.array(known)))
    if lang:
        if "langs" not in table.column_names:
            raise DataError("--lang was given but the captions have no languages: see --lang-column")
        languages = set(pc.unique(pc.list_flatten(table["langs"])).to_pylist())
        for name in lang:
            if name not in languages:
                raise DataError(f"no caption is in the language {name!r} ({nearest(name, languages)})")
        table = select_captions(table, "langs", lang)
        table = table.filter(pc.greater(pc.list_value_length(table["captions"]), 0))
    if table.num_rows == 0:
        raise DataError("no image is left after --split and --lang: widen them")
    return replace(pairs, table=table.combine_chunks())


def _known(table: pa.Table, column: str, wanted: Sequence[str], option: str) -> list[str]:
    if column not in table.column_names:
        raise DataError(f"{option} was given but the pairs have no {column} column: see {option}-column")
    known = set(pc.unique(table[column]).to_pylist())
    for name in wanted:
        if find_split(name, known) is None:
            raise DataError(f"no image is in the {column} {name!r} ({nearest(name, known)})")
    return [find_split(name, known) or name for name in wanted]


def select_captions(table: pa.Table, column: Literal["langs", "fields"], wanted: Sequence[str]) -> pa.Table:
    """The table with only the captions in these languages or fields; some images may be left without captions."""
    table = table.combine_chunks()
    values = pc.list_flatten(table[column]).combine_chunks()
    parents = pc.list_parent_indices(table[column]).combine_chunks().to_numpy()
    selected = pc.is_in(values, pa.array(list(wanted))).to_numpy(zero_copy_only=False)
    counts = np.bincount(parents[selected], minlength=table.num_rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    rows = pa.array(np.flatnonzero(selected))
    for name in ("captions", "langs", "fields"):
        if name not in table.column_names:
            continue
        values = pc.list_flatten(table[name]).combine_chunks().take(rows)
        index = table.column_names.index(name)
        table = table.set_column(index, name, pa.ListArray.from_arrays(offsets, values))
    return table
