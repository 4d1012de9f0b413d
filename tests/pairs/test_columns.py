from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, hub_table, picture

from litune.errors import DataError
from litune.pairs.pairs import Pairs, read_pairs
from litune.pairs.reference import read_bytes, read_each


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


def write_arrow(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def test_files_that_the_state_names(tmp_path: Path) -> None:
    """What save_to_disk has listed is read, in its order, and nothing else; what is missing of it is named."""
    whole = tmp_path / "whole"
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, part in zip(names, (NAMES[:6], NAMES[6:]), strict=True):
        write_arrow(whole / name, hub_table(part))
    write_arrow(whole / "cache-12ab_indices.arrow", pa.table({"indices": [1, 2]}))
    state = json.dumps({"_data_files": [{"filename": name} for name in (*names, "../data.arrow", 3)]})
    (whole / "state.json").write_text(state)
    assert pictures(read_pairs(whole)) == [picture(name) for name in NAMES]

    (whole / names[1]).unlink()
    with pytest.raises(DataError, match=rf"1 of 2 files in .*{names[1]}: the file does not exist"):
        read_pairs(whole)
    (whole / names[1]).write_bytes(b"no Arrow")
    pairs = read_pairs(whole, max_damaged=0.5)
    assert pictures(pairs) == [picture(name) for name in NAMES[:6]]
    assert [(d.key, d.whole_file) for d in pairs.damaged] == [(str(whole / names[1]), True)]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["whole", "test"]}')
    absent = read_pairs(tmp_path, max_damaged=0.7).damaged
    assert [d.key for d in absent] == [str(whole / names[1]), str(tmp_path / "test" / "state.json")]


def test_arrow_files_alone(tmp_path: Path) -> None:
    """As datasets keeps what it has downloaded: named for the set and the split, without a state."""
    write_arrow(tmp_path / "beans-train.arrow", hub_table(NAMES[:8]))
    write_arrow(tmp_path / "beans-validation.arrow", hub_table(NAMES[8:]))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read_pairs(tmp_path).table["split"].to_pylist() == ["train"] * 8 + ["val"] * 4
    assert len(read_pairs(tmp_path / "beans-train.arrow")) == 8


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
    cells = [{"bytes": None, "path": path} for path in (str(tmp_path / "x.png"), "x.png", "gone.png", None)]
    cells += [None]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pa.parquet.write_table(pa.table({"image": pa.array(cells, struct)}), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path / "a.parquet")
    found = read_each(pairs.table["path"].to_pylist())
    assert [next(found), next(found)] == [picture(NAMES[2])] * 2  # beside the table, in whatever folder one is
    assert str(next(found)) == f"{tmp_path}/gone.png, which it names, does not exist"
    assert "2 rows without a picture left out" in pairs.source


def test_names_and_structs_of_captions(tmp_path: Path) -> None:
    """Columns in any case; captions in structs, as COCO's on the hub."""
    struct = [[{"raw": f"a {name}", "sentid": 1}] for name in NAMES]
    table = hub_table(NAMES).drop_columns(["caption"]).append_column("Sentences", pa.array(struct))
    table = table.append_column("Split", pa.array(["val"] * 12)).rename_columns({"image": "Image"})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.table["captions"].to_pylist() == [[f"a {name}"] for name in NAMES]
    assert set(pairs.table["split"].to_pylist()) == {"val"}


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
