"""`litune embed` on pictures in archives: the same store as from files, resumed, damaged, from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, hub_table, picture, sample, write_shards, write_tar

from litune.cli import parse
from litune.errors import DataError
from litune.image import encoding
from litune.pairs.reference import read_bytes
from litune.store.embed import embed
from litune.store.store import FeatureStore
from litune.tuning.pixels import PixelLoader


@pytest.fixture
def loose(tower_module: str, tmp_path: Path) -> FeatureStore:
    """All pictures embedded as files."""
    (tmp_path / "files").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "files" / f"{i:02}.png").write_bytes(picture(name))
    return embed(pairs=tmp_path / "files", image_tower=tower_module, out=tmp_path / "loose", batch_size=5)


def test_the_same_store_as_from_files(loose: FeatureStore, tower_module: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in write_shards(tmp_path / "tars").glob("*.tar"):
        memory.pipe(f"/litune-embed/{file.name}", file.read_bytes())
    pyarrow.parquet.write_table(hub_table(NAMES), tmp_path / "a.parquet", row_group_size=5)
    sources = [f"{tmp_path}/tars/*.tar", tmp_path / "a.parquet", "memory://litune-embed"]
    for i, source in enumerate(sources):
        config = parse(["embed", str(source), "--image-tower", tower_module, "--out", str(tmp_path / str(i))])
        assert config.pairs == str(source)
        keep = [] if i == 1 else ["width"]
        store = embed(pairs=source, image_tower=tower_module, out=tmp_path / str(i), batch_size=5, keep=keep)
        assert np.array_equal(store.features(slice(None)), loose.features(slice(None)))
        assert store.metadata["sha256"].equals(loose.metadata["sha256"])
        assert store.metadata["width"].to_pylist() == [48] * 12, "as decoded, not as the metadata has it"
        if i != 1:
            assert store.metadata["url"][0].as_py() == f"http://example/{NAMES[0]}"
        paths = store.metadata["image_path"].to_pylist()
        assert [read_bytes(path) for path in paths] == [picture(name) for name in NAMES]
        pixels = PixelLoader(paths, lambda p: np.asarray(p), workers=1, ahead=4, max_damaged=0.0)
        assert sum(len(batch) for _, batch in pixels.in_order(5)) == 12
    memory.rm("/litune-embed", recursive=True)


def test_it_goes_on_in_the_middle_of_a_shard(
    loose: FeatureStore, tower_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"pairs": write_shards(tmp_path / "tars", 2), "image_tower": tower_module, "out": tmp_path / "s"}
    whole, rows = encoding.decode, []
    monkeypatch.setattr("litune.store.build.SHARD_SECONDS", 0.0)

    def stopping(row: int, *rest: object) -> object:
        rows.append(row)
        if row == 9 and len(rows) < 12:
            raise KeyboardInterrupt
        return whole(row, *rest)

    monkeypatch.setattr(encoding, "decode", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(**settings, batch_size=2, workers=1)
    seen = json.loads((tmp_path / "s" / "store.json").read_text())["seen"]
    assert 0 < seen < 10
    rows.clear()
    monkeypatch.setattr(encoding, "decode", lambda row, *rest: rows.append(row) or whole(row, *rest))
    store = embed(**settings, batch_size=2, workers=1)
    assert rows == list(range(seen, 12)), "nothing is read twice"
    assert np.array_equal(store.features(slice(None)), loose.features(slice(None)))


def test_damage_is_named(loose: FeatureStore, tower_module: str, tmp_path: Path) -> None:
    """A picture that is none, a caption that is none, a link, a shard that is cut off: the rest is embedded."""
    shards = write_shards(tmp_path / "tars")
    members = [m for j, name in enumerate(NAMES[4:8]) for m in sample(f"00001{j:04}", name)]
    members[3] = (members[3][0], b"<html>")
    members[8] = (members[8][0], b"\xff")
    write_tar(shards / "00001.tar", members)
    last = (shards / "00002.tar").read_bytes()
    (shards / "00002.tar").write_bytes(last[: len(last) // 2])
    with pytest.raises(DataError, match="can't be used"):
        embed(pairs=shards, image_tower=tower_module, out=tmp_path / "s")
    store = embed(pairs=shards, image_tower=tower_module, out=tmp_path / "s", max_damaged=0.5)
    named = [json.loads(line)["key"] for line in (tmp_path / "s" / "damaged.jsonl").read_text().splitlines()]
    assert named[0] == "00001/000010002"
    assert named[1].startswith(f"{shards}/00002.tar")
    assert named[-1] == "00001/000010001"
    assert store.manifest["damaged"] == len(named)
    captions = [c[0] for c in store.metadata["captions"].to_pylist() if c]
    expected = [f"a {name}" for i, name in enumerate(NAMES) if i not in (5, 6)]
    assert captions == expected[: len(captions)]
    assert len(captions) >= 7
