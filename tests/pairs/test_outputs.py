"""What litune wrote among somebody's pictures is none of them, by every command that writes a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from litune.curation.dedup import dedup_data
from litune.curation.filter import filter_data
from litune.curation.inspect import inspect_data
from litune.evaluation.evaluate import evaluate
from litune.pairs.outputs import is_output
from litune.pairs.pairs import read_pairs
from litune.store.embed import embed


@pytest.fixture
def lived_in(class_tree: Path, run: Path, tower_module: str) -> Path:
    """A class tree with a store, a run, a report, and a look at the pairs in it."""
    shutil.copytree(run, class_tree / "runs" / "first")
    embed(pairs=class_tree, image_tower=tower_module, out=class_tree / "features")
    inspect_data(pairs=class_tree, out=class_tree / "look")
    dedup_data(pairs=class_tree, out=class_tree / "unique", image_tower=tower_module)
    evaluate(run=class_tree / "runs" / "first", store=class_tree / "features", out=class_tree / "report")
    return class_tree


def test_outputs_in_a_class_tree(lived_in: Path, tower_module: str) -> None:
    assert [path.name for path in sorted(lived_in.iterdir()) if is_output(path)] == [
        "features", "look", "report", "runs", "unique",
    ]  # fmt: skip
    assert len(read_pairs(lived_in)) == 12
    assert len(read_pairs(f"file://{lived_in}")) == 12
    out = lived_in / "features"
    assert len(embed(pairs=lived_in, image_tower=tower_module, out=out, overwrite=True)) == 12


def test_an_unfinished_store_in_its_own_tree(class_tree: Path, tower_module: str) -> None:
    (class_tree / "red" / "broken.png").write_bytes(b"not a picture")
    settings = {"pairs": class_tree, "image_tower": tower_module, "out": class_tree / "features"}
    with pytest.raises(Exception, match="more|at most"):
        embed(**settings)
    assert is_output(class_tree / "features")
    assert len(embed(**settings, max_damaged=0.5)) == 12


def test_an_unfinished_search_for_duplicates_goes_on_in_its_tree(class_tree: Path, tower_module: str) -> None:
    (class_tree / "unique" / "work").mkdir(parents=True)
    assert dedup_data(pairs=class_tree, out=class_tree / "unique", image_tower=tower_module)["images"] == 12


def test_a_begun_run(tmp_path: Path, class_tree: Path) -> None:
    """A config.json of litune's own marks a run; another tool's does not."""
    (class_tree / "run").mkdir()
    (class_tree / "run" / "config.json").write_text('{"store": "s", "text_tower": "t"}')
    assert is_output(class_tree / "run")
    (class_tree / "run" / "config.json").write_text('{"model_type": "bert"}')
    assert not is_output(class_tree / "run")
    assert not is_output(class_tree / "red")


@pytest.mark.parametrize("name", ["kept.csv", "kept.parquet", "kept.jsonl"])
def test_tables_beside_their_source(photos: Path, name: str) -> None:
    """A table that a command writes beside the one that it reads is not read by the next call."""
    settings = {"pairs": photos, "out": photos / name, "dropped": photos / "dropped.csv", "min_side": 50}
    first = filter_data(**settings)
    again = filter_data(**settings, overwrite=True)
    assert again["source"] == first["source"]
    assert again["kept_images"] == first["kept_images"] == 12
