from __future__ import annotations

import json
from pathlib import Path

import pytest

from litune.commands.data_inspect import inspect_data
from litune.errors import OutputExistsError
from litune.features import FeatureStore


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
    assert found["languages"]["declared"] == {"en": 48, "de": 24}
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


def test_sample_and_verify(store: FeatureStore, photos: Path) -> None:
    cut = photos / "images" / "red-bar-0.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    settings = {"pairs": store.path, "tokenizer": "none"}
    assert inspect_data(**settings)["files"]["damaged"] == 0
    assert inspect_data(**settings, verify=True)["files"]["damaged"] == 1
    found = inspect_data(**settings, sample=7)
    assert found["files"]["opened"] == 7
    assert found["captions"]["captions"] == 72
