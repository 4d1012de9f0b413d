"""Rules on pairs, applied in order; what each drops is counted and recorded by the rule's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EXAMPLES = 5


@dataclass
class Pool:
    """n images and their N captions under rules; `by_image` [n] and `by_caption` [N] name the rule that dropped each.

    They hold the rule's number, from 1; 0 is not dropped. `table` has the columns of `Pairs.table`.
    """

    table: pa.Table
    captions: pa.Array = field(init=False)
    owner: np.ndarray = field(init=False)
    by_image: np.ndarray = field(init=False)
    by_caption: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.table = self.table.combine_chunks()
        lists = self.table["captions"].combine_chunks()
        self.captions = lists.flatten()
        self.owner = np.repeat(np.arange(len(self.table)), pc.list_value_length(lists).to_numpy(zero_copy_only=False))
        self.by_image = np.zeros(len(self.table), np.uint8)
        self.by_caption = np.zeros(len(self.captions), np.uint8)

    def flat(self, column: str) -> pa.Array | None:
        """A column with one value per caption ("langs", "fields"), flattened to [N]; None where the table has none."""
        return self.table[column].combine_chunks().flatten() if column in self.table.column_names else None

    @property
    def images_left(self) -> np.ndarray:
        """The positions of the images that are left so far."""
        return np.flatnonzero(self.by_image == 0)

    @property
    def captions_left(self) -> np.ndarray:
        """The positions of the captions that are left so far."""
        return np.flatnonzero(self.by_caption == 0)

    def kept(self) -> pa.Table:
        """The table of what is left."""
        keep = self.by_caption == 0
        counts = np.bincount(self.owner[keep], minlength=len(self.table))
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        table = self.table
        for name in ("captions", "langs", "fields"):
            values = self.captions if name == "captions" else self.flat(name)
            if values is not None:
                lists = pa.ListArray.from_arrays(offsets, values.filter(pa.array(keep)))
                table = table.set_column(table.column_names.index(name), name, lists)
        return table.filter(pa.array(self.by_image == 0))


@dataclass(frozen=True)
class Rule:
    """A rule on `images` or `captions`: `keeps` says which of those at the given positions it keeps, as bool."""

    name: str
    of: str
    keeps: Callable[[Pool, np.ndarray], np.ndarray]


def apply(pool: Pool, rules: list[Rule]) -> Iterator[dict[str, Any]]:
    """Apply each rule to what is left; yields its counts and examples.

    An image is dropped with the last of its captions, and its captions with it.
    """
    for number, rule in enumerate(rules, 1):
        left = pool.images_left if rule.of == "images" else pool.captions_left
        keeps = rule.keeps(pool, left) if len(left) else np.ones(0, bool)
        dropped_rows = left[~keeps]
        if rule.of == "images":
            pool.by_image[dropped_rows] = number
            pool.by_caption[(pool.by_caption == 0) & (pool.by_image[pool.owner] == number)] = number
        else:
            pool.by_caption[dropped_rows] = number
            remaining = np.bincount(pool.owner[pool.by_caption == 0], minlength=len(pool.table))
            owners = np.unique(pool.owner[dropped_rows])
            pool.by_image[owners[remaining[owners] == 0]] = number
        yield {
            "rule": rule.name,
            "of": rule.of,
            "tested": len(left),
            "dropped_images": int((pool.by_image == number).sum()),
            "dropped_captions": int((pool.by_caption == number).sum()),
            "examples": _examples(pool, rule, dropped_rows),
        }


def _examples(pool: Pool, rule: Rule, rows: np.ndarray) -> list[dict[str, str]]:
    """Examples of what a rule dropped, spread evenly over the pairs."""
    sample = rows[np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(int)]
    keys = pool.table["key"]
    if rule.of == "images":
        return [{"key": keys[int(i)].as_py()} for i in sample]
    return [{"key": keys[int(pool.owner[i])].as_py(), "caption": pool.captions[int(i)].as_py()} for i in sample]


def dropped(pool: Pool, rules: list[Rule]) -> pa.Table:
    """What the rules dropped, a row per caption (or image without captions).

    Columns: key, caption, rule; lang and field where the pairs have them; and times, the number of equal rows, for an
    image that has a caption more than once.
    """
    names = np.array(["", *(rule.name for rule in rules)], dtype=object)
    gone = np.flatnonzero(pool.by_caption)
    bare = np.flatnonzero((pool.by_image > 0) & (np.bincount(pool.owner, minlength=len(pool.table)) == 0))
    rows = np.concatenate([pool.owner[gone], bare])
    captions = pa.concat_arrays([pool.captions.take(pa.array(gone)), pa.nulls(len(bare), pa.string())])
    reasons = np.concatenate([names[pool.by_caption[gone]], names[pool.by_image[bare]]])
    table = pa.table({"row": rows, "caption": captions, "rule": pa.array(reasons.tolist(), pa.string())})
    for name, column in (("lang", "langs"), ("field", "fields")):
        if (values := pool.flat(column)) is not None:
            values = pa.concat_arrays([values.take(pa.array(gone)), pa.nulls(len(bare), pa.string())])
            table = table.append_column(name, values)
    counted = table.group_by(table.column_names, use_threads=False).aggregate([([], "count_all")])
    counted = counted.rename_columns([*table.column_names, "times"])
    return counted.set_column(0, "key", pool.table["key"].take(counted["row"]))
