from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, hub_table, picture, write_shards

from litune.errors import DataError
from litune.pairs import reference as references
from litune.pairs.pairs import read_pairs
from litune.pairs.reference import Member, PictureCell, absolute, parse, read_bytes, read_each

PICTURES = [picture(name) for name in NAMES]


def test_forms() -> None:
    assert parse("/data/00000.tar::1536+20480::0001.jpg") == Member("/data/00000.tar", 1536, 20480, "0001.jpg")
    assert parse("/data/a.parquet::3/17::image") == PictureCell("/data/a.parquet", 3, 17, "image")
    for plain in ("/data/a.jpg", "s3://bucket/a::b.jpg", "/data/a::b/c.jpg"):
        assert parse(plain) == plain
    assert absolute("s3://bucket/x.tar::512+3::a//b.jpg") == "s3://bucket/x.tar::512+3::a//b.jpg"
    assert absolute("file:///data/a.jpg") == "/data/a.jpg"
    assert absolute("a.jpg") == str(Path("a.jpg").absolute())


def test_every_way_gives_the_same_bytes(tmp_path: Path) -> None:
    tars = read_pairs(write_shards(tmp_path / "tars")).table["path"].to_pylist()
    pyarrow.parquet.write_table(hub_table(NAMES), tmp_path / "a.parquet", row_group_size=5)
    rows = read_pairs(tmp_path / "a.parquet").table["path"].to_pylist()
    for found in (tars, rows):
        assert [read_bytes(one) for one in found] == PICTURES
        assert list(read_each(found)) == PICTURES
        backwards = found[::-1]
        assert list(read_each(backwards)) == PICTURES[::-1]
    assert list(read_each([tars[0], rows[1], tars[1], tars[2]])) == [PICTURES[i] for i in (0, 1, 1, 2)]


def test_neighbours_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = read_pairs(write_shards(tmp_path, shards=2)).table["path"].to_pylist()
    reads: list[int] = []
    whole = references.read_part
    monkeypatch.setattr(references, "read_part", lambda a, s, n: reads.append(n) or whole(a, s, n))
    assert list(read_each(paths)) == PICTURES
    assert len(reads) == 2, "one read per shard"
    monkeypatch.setattr(references, "SPAN", 2000)
    reads.clear()
    assert list(read_each(paths)) == PICTURES
    assert len(reads) > 2
    assert all(n <= 2000 + 512 for n in reads)


def test_a_tar_that_has_changed(tmp_path: Path) -> None:
    paths = read_pairs(write_shards(tmp_path, shards=1)).table["path"].to_pylist()
    shard = tmp_path / "00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * 512 + whole)
    with pytest.raises(DataError, match=r"has changed: .* is not at byte 512 any more"):
        read_bytes(paths[0])
    member = parse(paths[5])
    assert isinstance(member, Member)
    shard.write_bytes(whole[: member.offset + 10])
    found = list(read_each(paths))
    assert found[:5] == PICTURES[:5], "what is still there can be read"
    assert all(isinstance(one, DataError) and "ends in the middle" in str(one) for one in found[5:])
    shard.unlink()
    assert all(isinstance(one, FileNotFoundError) for one in read_each(paths))


def test_a_column_that_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(hub_table(NAMES[:2]), file)
    for reference in (f"{file}::0/7::image", f"{file}::4/0::image", f"{file}::0/0::photo"):
        with pytest.raises(DataError, match="has changed"):
            read_bytes(reference)


def test_large_row_groups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow.parquet.write_table(hub_table(NAMES), tmp_path / "a.parquet")
    monkeypatch.setattr(references, "MOST_BYTES", 100)
    with pytest.raises(DataError, match="write the file anew with smaller ones"):
        read_bytes(f"{tmp_path}/a.parquet::0/0::image")


def test_few_row_groups_stay_in_memory(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(hub_table(NAMES), tmp_path / "a.parquet", row_group_size=1)
    for i, whole in enumerate(PICTURES):
        assert read_bytes(f"{tmp_path}/a.parquet::{i}/0::image") == whole
    assert len(references._rows._kept) == references.GROUPS_KEPT


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="is not a regular file"):
            read_bytes(path)
    (tmp_path / "large.jpg").write_bytes(b"x" * 101)
    monkeypatch.setattr(references, "MOST_BYTES", 100)
    with pytest.raises(DataError, match="more than 100 bytes"):
        read_bytes(tmp_path / "large.jpg")
    with pytest.raises(DataError, match="at most 100"):
        read_bytes(f"{tmp_path}/large.jpg::512+200::x")


def test_elsewhere(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in write_shards(tmp_path).glob("*.tar"):
        memory.pipe(f"/litune-references/{file.name}", file.read_bytes())
    pairs = read_pairs("memory://litune-references/{00000..00002}.tar")
    assert list(read_each(pairs.table["path"].to_pylist())) == PICTURES
    assert pairs.table["path"][0].as_py().startswith("memory://")
    memory.rm("/litune-references", recursive=True)
    assert isinstance(next(read_each(pairs.table["path"].to_pylist())), FileNotFoundError)
