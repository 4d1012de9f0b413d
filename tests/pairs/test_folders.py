from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, hub_table, picture, write_shards

from litune.errors import DataError
from litune.pairs.pairs import read_pairs, say_pairs
from litune.pairs.sample import say_passed_over


def test_img2datasets_files(tmp_path: Path) -> None:
    for part in ("00000", "00001"):
        (tmp_path / part).mkdir()
        for i, name in enumerate(NAMES[:3]):
            stem = tmp_path / part / f"{part}{i:04}"
            stem.with_suffix(".png").write_bytes(picture(name))
            stem.with_suffix(".txt").write_text(f"a {name}")
            stem.with_suffix(".json").write_text(json.dumps({"url": f"http://x/{i}", "caption": "other", "lang": "en"}))
        (tmp_path / f"{part}_stats.json").write_text("{}")
        pa.parquet.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / f"{part}.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.source == f"2 folders of img2dataset in {tmp_path}"
    assert pairs.table["key"][3].as_py() == "00001/000010000"
    assert pairs.table["captions"].to_pylist() == [[f"a {name}"] for name in NAMES[:3]] * 2
    assert pairs.table["url"][1].as_py() == "http://x/1"
    assert read_pairs(tmp_path, caption_columns=["caption"]).table["captions"][0].as_py() == ["other"]


def test_captions_beside_images(tmp_path: Path) -> None:
    for name in NAMES[:3]:
        (tmp_path / f"{name}.png").write_bytes(picture(name))
    (tmp_path / f"{NAMES[0]}.txt").write_text("the first")
    (tmp_path / f"{NAMES[1]}.txt").write_bytes(b"\xff\x01")
    (tmp_path / f"{NAMES[2]}.json").write_text("{")
    pairs = read_pairs(tmp_path, max_damaged=0.7)
    assert pairs.table["captions"].to_pylist() == [["the first"], []]
    assert [d.key for d in pairs.damaged] == [f"{NAMES[1]}.png", f"{NAMES[2]}.png"]
    assert "kept without it" in pairs.damaged[1].reason
    assert pairs.source == "a folder of 2 images with captions beside them, 1 images without a caption"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(NAMES[0]))
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(picture(NAMES[1]))
    pairs = read_pairs(tmp_path, max_damaged=0.5)
    assert pairs.table["key"].to_pylist() == ["a.png"]
    assert [d.reason for d in pairs.damaged] == ["the image's name is not UTF-8"]
    json.dumps(pairs.damaged[0].key).encode()


def test_capital_suffixes(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.JPG").write_bytes(picture(name, "JPEG"))
        (tmp_path / f"{name}.TXT").write_text(f"a {name}")
    pairs = read_pairs(tmp_path)
    assert pairs.table["captions"].to_pylist() == [[f"a {name}"] for name in sorted(NAMES)]
    assert pairs.source == "a folder of 12 images with captions beside them"


def test_where_it_may_be(tmp_path: Path) -> None:
    """A folder that has nothing itself says where in it something is."""
    (tmp_path / "a" / "b" / "red").mkdir(parents=True)
    with pytest.raises(DataError, match="no class folders with images$"):
        read_pairs(tmp_path)
    (tmp_path / "a" / "b" / "red" / "x.png").write_bytes(picture("red-bar"))
    with pytest.raises(DataError, match=f"perhaps you meant {tmp_path}/a/b$"):
        read_pairs(tmp_path)
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(DataError, match=f"{tmp_path}/x.tar.gz is compressed, unpack it first$"):
        read_pairs(tmp_path)


def test_two_kinds(tmp_path: Path) -> None:
    """Shards and their own tables are one set; shards and pictures in Parquet are two."""
    write_shards(tmp_path)
    assert len(read_pairs(tmp_path)) == 12
    pa.parquet.write_table(hub_table(NAMES), tmp_path / "more.parquet")
    with pytest.raises(DataError, match=r"00000.tar and .*more.parquet are files of different kinds"):
        read_pairs(tmp_path)


def test_pictures_that_are_not_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By kind, with what reads them, in a folder, in class folders and where there is nothing else."""
    for part in ("flat", "tree/red", "tree/blue"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "a.png").write_bytes(picture(NAMES[0]))
        for name in ("b.SVG", "c.svg", "d.CR2", "e.jpg_large", "f.jpg!thumb", "g.txt", "h.pdf"):
            (tmp_path / part / name).write_bytes(b"x")
    say_pairs(read_pairs(tmp_path / "flat"))
    assert "passed over 5 files that are not read: 2 .svg, 1 .cr2" in capsys.readouterr().err
    say_pairs(read_pairs(tmp_path / "tree"))
    assert "passed over 10 files that are not read: 4 .svg, 2 .cr2" in capsys.readouterr().err
    say_pairs(read_pairs(f"file://{tmp_path}/tree"))
    assert "passed over 10 files" in capsys.readouterr().err
    (tmp_path / "tree" / "red" / "a.png").unlink()
    with pytest.raises(DataError, match=r"red has no images \(passed over 5 files"):
        read_pairs(tmp_path / "tree")
    assert say_passed_over(Counter({".heic": 2, ".jxl": 1})).endswith(
        "1 .jxl (HEIC, JXL: pip install 'litune[pictures]')"
    )
