from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.pairs.packed import NAMES, sample, write_tar

from litune.curation.inspect import inspect_data
from litune.errors import OutputExistsError
from litune.store.store import FeatureStore


def test_overview(photos: Path, tiny_bert: Path, tmp_path: Path) -> None:
    (photos / "images" / "red-bar-1.png").write_bytes((photos / "images" / "red-bar-0.png").read_bytes())
    (photos / "images" / "red-box-0.png").write_bytes(b"no picture")
    found = inspect_data(pairs=photos, out=tmp_path / "out", tokenizer=f"hf:{tiny_bert}", max_tokens=5, pictures=6)
    assert found["images"] == 24
    assert found["split"] == {"train": 18, "val": 6}
    captions, files, tokens = found["captions"], found["files"], found["tokens"]
    assert captions["captions"] == 72
    assert captions["words_histogram"] == {"3–4": 48, "5–7": 24}
    assert captions["on_several_images"] == 72  # two pictures of each color and shape
    assert captions["most_repeated"]["a blue bar"] == 2
    languages = found["languages"]
    assert languages["declared"] == {"en": 48, "de": 24}
    assert (languages["captions_counted"], languages["too_short"]) == (72, 0)
    assert sum(languages["identified"].values()) == 72
    assert files["equal_examples"] == [["red-bar-0.png", "red-bar-1.png"]]
    assert files["damaged_examples"] == {"red-box-0.png": "not an image"}
    assert files["short_side"]["most"] == 56
    # "a red bar", "bar in red": [CLS] and three; "the bar is red, really": [CLS] and six, of which two are cut
    assert tokens["tokens_histogram"] == {"1–4": 48, "5–8": 24}
    assert tokens["captions_cut"] == pytest.approx(1 / 3, abs=1e-4)
    assert tokens["tokens_lost"] == pytest.approx(2 * 24 / (4 * 48 + 7 * 24), abs=1e-4)
    assert json.loads((tmp_path / "out" / "overview.json").read_text()) == json.loads(json.dumps(found))
    page = (tmp_path / "out" / "overview.html").read_text()
    assert page.count("<figure>") == 6
    assert "red-box-0.png" in page
    assert "http" not in page
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["overview.html", "overview.json"]
    with pytest.raises(OutputExistsError):
        inspect_data(pairs=photos, out=tmp_path / "out")


def test_what_is_damaged(tmp_path: Path) -> None:
    """A damaged picture is named with its shard, what was skipped with its reason, short captions are counted."""
    members = [part for name in NAMES for part in sample(name, name, caption=f"the picture of a {name}")]
    members = [(name, b"" if name == "red-box.png" else data) for name, data in members if name != "blue-box.png"]
    members = [(name, b"\xff" if name == "red-bar.txt" else data) for name, data in members]
    write_tar(tmp_path / "shards" / "00000.tar", members)
    found = inspect_data(pairs=tmp_path / "shards", out=tmp_path / "out", tokenizer="none", max_damaged=0.5)
    assert found["files"]["damaged_examples"] == {
        f"00000/red-box in {tmp_path}/shards/00000.tar": "not an image",
    }
    assert found["skipped_inputs"] == 2
    assert found["skipped_examples"] == {
        "00000/blue-box": "the sample has no picture, only .json, .txt",
        "00000/red-bar": "the caption is not UTF-8",
    }
    page = (tmp_path / "out" / "overview.html").read_text()
    assert "the caption is not UTF-8" in page
    languages = found["languages"]
    assert languages["captions_counted"] == languages["too_short"] == 10
    assert languages["identified"] == {}


def test_sample_and_verify(store: FeatureStore, photos: Path) -> None:
    cut = photos / "images" / "red-bar-0.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    settings = {"pairs": store.path, "tokenizer": "none"}
    assert inspect_data(**settings)["files"]["damaged"] == 0
    assert inspect_data(**settings, verify=True)["files"]["damaged"] == 1
    found = inspect_data(**settings, sample=7)
    assert found["files"]["opened"] == 7
    assert found["captions"]["captions"] == 72
