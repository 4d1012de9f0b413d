from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from litune.claims import claim
from litune.curation.filter import filter_data
from litune.errors import ConfigError, DataError, LituneError, OutputBusyError, OutputExistsError
from litune.pairs.pairs import read_pairs
from litune.store.embed import embed
from litune.store.store import FeatureStore


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """Six pictures of various sizes, with captions good and bad."""
    folder = tmp_path / "noisy"
    folder.mkdir()
    sizes = {"a": (300, 210), "b": (900, 210), "c": (210, 900), "d": (150, 400), "e": (250, 250), "f": (220, 240)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
    rows = [
        ("a", "a dog runs over the grass"), ("a", "IMG_0001.JPG"), ("b", "a very wide picture of hills"),
        ("c", "a very tall picture of a tower"), ("d", "this picture is too small"), ("e", "buy now"),
        ("e", "Ein Hund läuft über die grüne Wiese"), ("f", "DSC00042"),
    ]  # fmt: skip
    lines = ["image,caption", *(f"{name}.png,{caption}" for name, caption in rows)]
    (folder / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_rules_in_their_order(noisy: Path, tmp_path: Path) -> None:
    found = filter_data(
        pairs=noisy, out=tmp_path / "kept.jsonl", dropped=tmp_path / "dropped.csv", report=tmp_path / "report.json",
        min_side=200, max_aspect=3, boilerplate="drop", min_words=3, languages=("en",),
    )  # fmt: skip
    counts = {r["rule"]: (r["tested"], r["dropped_images"], r["dropped_captions"]) for r in found["rules"]}
    assert counts == {
        "readable": (6, 0, 0),
        "min-side 200": (6, 1, 1),
        "max-aspect 3": (5, 2, 2),
        "boilerplate": (5, 1, 2),
        "min-words 3": (3, 0, 1),
        "languages en": (2, 1, 1),
    }
    assert found["rules"][3]["examples"][0] == {"key": "a.png", "caption": "IMG_0001.JPG"}
    assert read_pairs(tmp_path / "kept.jsonl").table["captions"].to_pylist() == [["a dog runs over the grass"]]
    dropped = (tmp_path / "dropped.csv").read_text().splitlines()
    assert len(dropped) == 1 + 7
    assert dropped[0] == "key,caption,rule,times"
    assert "f.png,DSC00042,boilerplate,1" in dropped
    assert "d.png,this picture is too small,min-side 200,1" in dropped
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kept_images"] == report["kept_captions"] == 1
    assert report["settings"]["max_aspect"] == 3


def test_missing_values_are_no_captions(tmp_path: Path) -> None:
    captions = ["nan", "NaN", "<NA>", "None", "null", "N/A", "NaT", "#N/A", "a dog"]
    for i in range(len(captions)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    lines = [f"{i}.png,{caption}" for i, caption in enumerate(captions)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    found = filter_data(pairs=tmp_path, out=tmp_path / "kept" / "k.jsonl", boilerplate="drop")
    assert (found["kept_images"], found["kept_captions"]) == (1, 1)
    assert [(rule["rule"], rule["dropped_images"]) for rule in found["rules"]] == [
        ("no caption", 8),
        ("boilerplate", 0),
    ]


def test_no_two_write_one_output(noisy: Path, tmp_path: Path) -> None:
    with claim(tmp_path / "kept.jsonl"), pytest.raises(OutputBusyError, match=r"kept\.jsonl is being written by"):
        filter_data(pairs=noisy, out=tmp_path / "kept.jsonl", min_words=3)
    assert not (tmp_path / "kept.jsonl").exists()


def test_dropped_captions_by_language(tmp_path: Path) -> None:
    """Of an image, equal captions in two languages are two rows; one that stands there twice is one, with its count."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    rows = ["a.png,ok,de", "a.png,ok,en", "a.png,ok,en", "a.png,three words here,en", "b.png,ok,en"]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption,lang", *rows]))
    found = filter_data(pairs=tmp_path / "t.csv", out=tmp_path / "k.csv", dropped=tmp_path / "d.csv", min_words=2)
    assert (tmp_path / "d.csv").read_text().splitlines() == [
        "key,caption,rule,lang,times",
        "a.png,ok,min-words 2,de,1",
        "a.png,ok,min-words 2,en,2",
        "b.png,ok,min-words 2,en,1",
    ]
    assert found["rules"][0]["dropped_captions"] == 4


def test_presets_and_their_values(photos: Path, tmp_path: Path) -> None:
    """A value that is given replaces the preset's; the others stay."""
    found = filter_data(pairs=photos, out=tmp_path / "k.parquet", preset="align", min_side=50, max_repeats=100)
    rules = [r["rule"] for r in found["rules"]]
    assert rules == [
        "readable", "min-side 50", "max-aspect 3", "max-captions 1000", "min-words 3", "max-words 20",
        "max-repeats 100", "vocabulary 100000000",
    ]  # fmt: skip
    assert found["kept_images"] == 12  # the larger copies, of 56 pixels
    assert set(pa.parquet.read_table(tmp_path / "k.parquet")["lang"].to_pylist()[0]) == {"en", "de"}


def test_yfcc(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text(
        'image,title,description,tags\na.png,DSC_0001,DSC_0001 is a beach,"sea,blue+sky"\nb.png,sunset,,"a,b,c,d,e"\n',
        encoding="utf-8",
    )
    found = filter_data(pairs=tmp_path / "t.csv", out=tmp_path / "out" / "k.parquet", preset="yfcc")
    assert [(r["rule"], r["dropped_captions"]) for r in found["rules"]] == [("titles yfcc", 1)]
    rows = pa.parquet.read_table(tmp_path / "out" / "k.parquet").to_pylist()
    assert rows[0]["title"] == []
    assert rows[0]["description"] == ["DSC_0001 is a beach"]
    assert rows[0]["tags"][0] in ("sea blue sky", "blue sky sea")
    assert sorted(rows[1]["tags"][0].split()) == list("abcde")
    again = filter_data(pairs=tmp_path / "t.csv", out=tmp_path / "out" / "k2.parquet", preset="yfcc", seed=1)
    assert again["kept_captions"] == 4
    assert pa.parquet.read_table(tmp_path / "out" / "k2.parquet")["tags"][1].as_py() != rows[1]["tags"]


def test_store_to_store(store: FeatureStore, tmp_path: Path) -> None:
    """Features and metadata of what is kept are those of the source."""
    filter_data(pairs=store.path, out=tmp_path / "less", min_side=50, lang=("de",), split=("train",))
    less = FeatureStore(tmp_path / "less")
    keys = less.metadata["key"].to_pylist()
    assert keys
    assert set(less.metadata["split"].to_pylist()) == {"train"}
    place = [store.metadata["key"].to_pylist().index(key) for key in keys]
    assert np.array_equal(less.features(slice(None)), store.features(place))
    assert less.tower == store.tower
    assert all(
        len(c) == len(lang)
        for c, lang in zip(*(less.metadata[n].to_pylist() for n in ("captions", "langs")), strict=True)
    )
    assert min(less.metadata["width"].to_pylist()) >= 50


def test_agreement(store: FeatureStore, tune_config: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions stay by the cosine that the run itself gives them."""
    import dataclasses

    from litune.model.run_folder import load
    from litune.tuning.tune import tune

    run = tune.run(dataclasses.replace(tune_config, evaluations=0, duration="60pairs"))  # type: ignore[type-var]
    del run
    out = tune_config.out  # type: ignore[attr-defined]
    model = load(out, device="cpu")
    selection = store.select(lang=["en"])
    images = model.encode_features(selection.features())[selection.owner]
    cosines = (images * model.encode_text(selection.captions)).sum(dim=1)
    least = float(cosines.median())
    found = filter_data(
        pairs=store.path, out=tmp_path / "k.parquet", lang=("en",), agree=out, min_agreement=least, device="cpu"
    )
    assert found["kept_captions"] == int((cosines >= least).sum())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ConfigError, "no rule is set"),
        ({"min_words": 99}, DataError, "the rules drop all 24 images"),
        ({"languages": ("xx",)}, ConfigError, "'xx' can't be identified"),
        ({"tags": "shuffle"}, DataError, "no caption is of the field 'tags'"),
        ({"agree": Path("run"), "min_agreement": 0.1}, ConfigError, "embed .* and give the store"),
        ({"agree": Path("run")}, ConfigError, "give both, or neither"),
        ({"min_words": 1, "out": Path("store")}, ConfigError, "stores are made of stores alone"),
        ({"min_words": 1, "out": Path("there.csv")}, OutputExistsError, "there.csv exists"),
        ({"min_side": 0}, ConfigError, "--min-side is 0"),
    ],
)
def test_bad_input(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    error: type[LituneError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    with pytest.raises(error, match=message):
        filter_data(**{"pairs": photos, "out": Path("k.csv"), **settings})
    assert Path("there.csv").read_text() == "mine"
    assert not Path("k.csv").exists()


def test_kept_table_embeds(noisy: Path, tower_module: str, tmp_path: Path) -> None:
    filter_data(pairs=noisy, out=tmp_path / "kept.csv", min_words=4)
    store = embed(pairs=tmp_path / "kept.csv", image_tower=tower_module, out=tmp_path / "s")
    assert len(store) == 5
