from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, picture, write_shards

from litune.config import ReadingConfig
from litune.curation.source import read_source
from litune.errors import DataError
from litune.pairs.pairs import read_pairs
from litune.store.embed import embed
from litune.store.store import FeatureStore


def test_a_store_is_embedded_anew(store: FeatureStore, tower_module: str, tmp_path: Path) -> None:
    pairs = read_pairs(store.path)
    for name in ("key", "captions", "langs", "split"):
        assert pairs.table[name].to_pylist() == store.metadata[name].to_pylist()
    again = embed(pairs=store.path, image_tower=tower_module, out=tmp_path / "again")
    assert np.array_equal(again.features(slice(None)), store.features(slice(None)))
    assert again.metadata.equals(store.metadata)


def test_text_fields_of_a_store(tower_module: str, tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "tars")
    store = embed(pairs=whole, image_tower=tower_module, out=tmp_path / "s", caption_column=("txt", "url"))
    again = read_pairs(tmp_path / "s")
    for name in ("key", "captions", "fields", "url"):
        assert again.table[name].to_pylist() == store.metadata[name].to_pylist()


def test_pictures_that_were_moved(store: FeatureStore, photos: Path, tmp_path: Path) -> None:
    before = [Path(path) for path in read_pairs(store.path).table["path"].to_pylist()]
    photos.rename(tmp_path / "elsewhere")
    pairs = read_pairs(store.path, images=tmp_path / "elsewhere")
    paths = [Path(path) for path in pairs.table["path"].to_pylist()]
    assert paths == [tmp_path / "elsewhere" / path.relative_to(photos) for path in before]
    assert all(path.is_file() for path in paths)
    assert read_source(ReadingConfig(store.path, images=tmp_path / "elsewhere")).pairs.table["path"].to_pylist() == [
        str(path) for path in paths
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of the images of the store .* in --images"):
        read_pairs(store.path, images=tmp_path / "empty")
    for option in ({"image_column": "x"}, {"caption_columns": ["x"]}, {"lang_column": "x"}):
        with pytest.raises(DataError, match="means nothing"):
            read_pairs(store.path, **option)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="--caption-column x means nothing"):
        read_source(ReadingConfig(store.path, caption_column=("x",)))


def test_what_clip_retrieval_wrote(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    for i, name in enumerate(NAMES[:2]):
        (tmp_path / f"{name}.png").write_bytes(picture(name))
        columns = {"image_path": [str(tmp_path / f"{name}.png")], "caption": [f"a {name}"], "url": ["http://x"]}
        pa.parquet.write_table(pa.table(columns), tmp_path / "metadata" / f"metadata_{i}.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.table["captions"].to_pylist() == [[f"a {name}"] for name in NAMES[:2]]
    assert all(Path(path).is_file() for path in pairs.table["path"].to_pylist())
