from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.data.packed import NAMES, hub_table, picture

from litune.data.pairs import Pairs, read_pairs
from litune.data.references import read_bytes, read_each
from litune.errors import DataError


def pictures(pairs: Pairs) -> list[bytes]:
    return [read_bytes(path) for path in pairs.table["path"].to_pylist()]


def test_hub_folders(tmp_path: Path) -> None:
    """As a dataset repository on the hub: data/SPLIT-00000-of-00002.parquet."""
    (tmp_path / "data").mkdir()
    for split, names in (("train", NAMES[:7]), ("test", NAMES[7:])):
        pa.parquet.write_table(
            hub_table(names), tmp_path / "data" / f"{split}-00000-of-00001.parquet", row_group_size=3
        )
    pairs = read_pairs(tmp_path)
    assert pairs.table["split"].to_pylist() == ["test"] * 5 + ["train"] * 7
    assert pictures(pairs) == [picture(name) for name in (*NAMES[7:], *NAMES[:7])]
    assert pairs.table["captions"][0].as_py() == [f"a {NAMES[7]}", f"one {NAMES[7]}"]
    assert pairs.table["key"][6].as_py() == "train-00000-of-00001/1"
    train = read_pairs(tmp_path, split=["train"])
    assert pictures(train) == [picture(name) for name in NAMES[:7]]
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "data").iterdir():
        memory.pipe(f"/litune-hub/data/{file.name}", file.read_bytes())
    elsewhere = read_pairs("memory://litune-hub")
    assert elsewhere.fingerprint() == pairs.fingerprint()
    assert pictures(elsewhere) == pictures(pairs)
    memory.rm("/litune-hub", recursive=True)


@pytest.mark.parametrize("form", ["stream", "file"])
def test_saved_to_disk(tmp_path: Path, form: str) -> None:
    """As datasets' save_to_disk: Arrow streams with a state beside them, one folder per split."""
    for split, names in (("train", NAMES[:5]), ("val", NAMES[5:])):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        table = hub_table(names)
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with new(folder / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "val"]}')
    pairs = read_pairs(tmp_path / "set")
    assert pairs.table["split"].to_pylist() == ["train"] * 5 + ["val"] * 7
    assert list(read_each(pairs.table["path"].to_pylist())) == [picture(name) for name in NAMES]
    one = read_pairs(tmp_path / "set" / "val")
    assert pictures(one) == [picture(name) for name in NAMES[5:]]
    assert len(set(pairs.table["key"].to_pylist())) == 12


def test_classes(tmp_path: Path) -> None:
    """Labels as numbers, their names in Hugging Face's metadata; the names are the captions where there are none."""
    features = {"label": {"names": ["polar_bear", "wombat"], "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}}).encode()
    table = hub_table(NAMES[:3]).drop_columns(["caption"]).append_column("label", pa.array([1, 0, 7]))
    pa.parquet.write_table(table.replace_schema_metadata({b"huggingface": about}), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.table["label"].to_pylist() == ["wombat", "polar_bear", ""]
    assert pairs.table["captions"].to_pylist() == [["wombat"], ["polar bear"], []]


def test_img2datasets_parquet(tmp_path: Path) -> None:
    """Bytes in a column named for their format; rows whose download failed have none."""
    columns = {
        "url": [f"http://example/{i}" for i in range(4)],
        "jpg": [picture(NAMES[0]), None, picture(NAMES[1]), None],
        "caption": ["one", "gone", "two", "gone"],
        "key": ["000000000", "000000001", "000000002", "000000003"],
        "status": ["success", "failed_to_download"] * 2,
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    pairs = read_pairs(tmp_path, keep=["status"])
    assert pairs.source == f"1 Parquet file with pictures in {tmp_path}, 2 rows without a picture left out"
    assert pairs.table["key"].to_pylist() == ["00000/000000000", "00000/000000002"]
    assert pairs.table["url"].to_pylist() == ["http://example/0", "http://example/2"]
    assert pairs.table["status"].to_pylist() == ["success"] * 2
    assert pictures(pairs) == [picture(NAMES[0]), picture(NAMES[1])]


def test_paths_in_place_of_bytes(tmp_path: Path) -> None:
    """A struct may have a path and no bytes, as datasets writes what was not embedded; or neither."""
    (tmp_path / "x.png").write_bytes(picture(NAMES[2]))
    cells = [{"bytes": None, "path": str(tmp_path / "x.png")}, {"bytes": None, "path": None}, None]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pa.parquet.write_table(pa.table({"image": pa.array(cells, struct)}), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path / "a.parquet")
    assert pictures(pairs) == [picture(NAMES[2])]
    assert "2 rows without a picture left out" in pairs.source


def test_columns(tmp_path: Path) -> None:
    table = (
        hub_table(NAMES[:2]).append_column("thumb", pa.array([b"1", b"2"])).append_column("alt", pa.array(["x", "y"]))
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path, image_column="thumb", caption_columns=["alt"])
    assert pictures(pairs) == [b"1", b"2"]
    assert pairs.table["captions"].to_pylist() == [["x"], ["y"]]
    with pytest.raises(DataError, match=r"no column 'al' \(perhaps you meant 'alt'\)"):
        read_pairs(tmp_path, caption_columns=["al"])
    with pytest.raises(DataError, match="no column of pictures named alt: its columns are image, caption, thumb, alt"):
        read_pairs(tmp_path, image_column="alt")


def test_damaged_files(tmp_path: Path) -> None:
    for i in range(3):
        pa.parquet.write_table(hub_table(NAMES[:4]), tmp_path / f"{i}.parquet")
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"1 of 3 files in .*1.parquet: the file can't be read"):
        read_pairs(tmp_path)
    pairs = read_pairs(tmp_path, max_damaged=0.4)
    assert len(pairs) == 8
    assert [d.whole_file for d in pairs.damaged] == [True]


def test_no_pictures(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"url": ["http://x/1"], "caption": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="is a list of URLs: fetch the images with litune data fetch"):
        read_pairs(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="has no .arrow files"):
        read_pairs(tmp_path / "set")
