from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageOps
from tests.curation.test_alignment import scene

from litune.claims import claim
from litune.curation import dedup as data_dedup
from litune.curation.dedup import dedup_data
from litune.errors import ConfigError, OutputBusyError, OutputExistsError, StoreError
from litune.pairs.pairs import read_pairs
from litune.store.embed import embed
from litune.store.store import FeatureStore


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """Tuning pictures 0 to 7 with copies among them and of evaluation pictures 6, 7 and 20 to 23."""
    tuning, evaluation = tmp_path / "tuning", tmp_path / "evaluation"
    tuning.mkdir()
    evaluation.mkdir()
    for i in range(8):
        scene(i).save(tuning / f"{i}.png")
    scene(0).resize((128, 96)).save(tuning / "0-small.jpg")  # goes: smaller than 0
    scene(1).resize((320, 240)).save(tuning / "1-large.jpg")  # stays in place of 1
    ImageOps.mirror(scene(2)).save(tuning / "2-mirrored.png")  # equally large: 2 is in the table before it
    (tuning / "3-equal.png").write_bytes((tuning / "3.png").read_bytes())
    (tuning / "7-equal.png").write_bytes((tuning / "7.png").read_bytes())
    files = sorted(p.name for p in tuning.iterdir())
    lines = ["image,caption", *(f"{name},{name.split('.')[0]}" for name in sorted(files, key=lambda n: ("-" in n, n)))]
    (tuning / "captions.csv").write_text("\n".join(lines))
    scene(6).save(evaluation / "six.jpg", quality=50)
    scene(7).crop((6, 5, 250, 188)).save(evaluation / "seven.png")
    for i in range(20, 24):
        scene(i).save(evaluation / f"{i}.png")
    return tuning, evaluation


# The color tower does not see what is mirrored: let every pair be a candidate.
ALL = {"neighbours": 13, "min_cosine": -1.0}
GONE = {
    "0-small.jpg": ("0.png", False), "1.png": ("1-large.jpg", False), "2-mirrored.png": ("2.png", False),
    "3-equal.png": ("3.png", True), "6.png": ("six.jpg", False), "7.png": ("seven.png", False),
    "7-equal.png": ("seven.png", False),
}  # fmt: skip


def removed(out: Path) -> dict[str, tuple[str, bool]]:
    lines = map(json.loads, (out / "removed.jsonl").read_text().splitlines())
    return {line["key"]: (line["duplicate_of"], line["exact"]) for line in lines}


def test_pairs_against_pairs(sets: tuple[Path, Path], tower_module: str, tmp_path: Path) -> None:
    tuning, evaluation = sets
    settings = {"pairs": tuning, "against": [evaluation], "image_tower": tower_module, "out": tmp_path / "out"}
    settings |= ALL
    with claim(tmp_path / "out"), pytest.raises(OutputBusyError):
        dedup_data(**settings)
    report = dedup_data(**settings)
    assert removed(tmp_path / "out") == GONE
    assert report["removed"] == {
        str(evaluation): {"images": 6, "exact": 0, "near": 3},
        "pairs": {"images": 13, "exact": 1, "near": 3},
    }
    kept = read_pairs(tmp_path / "out" / "kept.parquet").table
    assert [c[0] for c in kept["captions"].to_pylist()] == ["0", "2", "3", "4", "5", "1-large"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 2 * len(GONE)
    assert "http" not in text
    with pytest.raises(OutputExistsError, match="has a report"):
        dedup_data(**settings)


def test_goes_on(
    sets: tuple[Path, Path],
    tower_module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After an interruption nothing that is done is done again."""
    tuning, evaluation = sets
    settings = {"pairs": tuning, "against": [evaluation], "image_tower": tower_module, "out": tmp_path / "out"}
    settings |= ALL
    with monkeypatch.context() as patch:
        patch.setattr(data_dedup, "_remove_within", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dedup_data(**settings)
    for name in ("verify", "thumbnail", "embed_pairs"):
        monkeypatch.setattr(data_dedup, name, None)
    capsys.readouterr()
    dedup_data(**settings)
    assert removed(tmp_path / "out") == GONE
    said = capsys.readouterr().err
    assert "looking at pairs: 13 images, done before" in said
    assert "comparing with pairs: 55 candidates, done before" in said
    assert said.count("wrote ") == 1, "nothing of the folder work/ that means nothing to its reader"


def test_stores(sets: tuple[Path, Path], tower_module: str, tmp_path: Path) -> None:
    tuning, evaluation = sets
    stores = [embed(pairs=p, image_tower=tower_module, out=tmp_path / f"s-{p.name}") for p in (tuning, evaluation)]
    dedup_data(pairs=stores[0].path, against=[stores[1].path], within=False, out=tmp_path / "out")
    expected = {key for key, (other, _) in GONE.items() if other in ("six.jpg", "seven.png")}
    assert removed(tmp_path / "out").keys() == expected
    kept = FeatureStore(tmp_path / "out" / "store")
    assert set(kept.metadata["key"].to_pylist()) == set(stores[0].metadata["key"].to_pylist()) - expected
    place = [stores[0].metadata["key"].to_pylist().index(key) for key in kept.metadata["key"].to_pylist()]
    assert np.array_equal(kept.features(slice(None)), stores[0].features(place))


def test_bad_input(sets: tuple[Path, Path], tower_module: str, tmp_path: Path) -> None:
    tuning, evaluation = sets
    with pytest.raises(ConfigError, match="name the tower"):
        dedup_data(pairs=tuning, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to compare"):
        dedup_data(pairs=tuning, out=tmp_path / "out", within=False)
    store = embed(pairs=tuning, image_tower=tower_module, out=tmp_path / "s")
    code = (tmp_path / "colortower.py").read_text().replace("(pixels.float() / 255, 8)", "(pixels.float() / 255, 16)")
    (tmp_path / "othertower.py").write_text(code)
    other = embed(pairs=evaluation, image_tower="python:othertower:make", out=tmp_path / "t")
    with pytest.raises(StoreError, match="use one tower"):
        dedup_data(pairs=store.path, against=[other.path], out=tmp_path / "out")
