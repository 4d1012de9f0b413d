from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, hub_table, picture, sample, write_tar

from litune.errors import DataError
from litune.pairs.benchmarks import read_set
from litune.pairs.pairs import Pairs, read_pairs, say_pairs

PICTURE = picture(NAMES[0])


def fill(root: Path, *files: str) -> Path:
    """A folder with files: pictures, or what stands behind a colon."""
    for file in files:
        name, _, text = file.partition(":")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode() if text else PICTURE)
    return root


def rows(pairs: Pairs, *columns: str) -> list[tuple[object, ...]]:
    return sorted(zip(*(pairs.table[column].to_pylist() for column in ("key", *columns)), strict=True))


def test_a_loose_picture_beside_class_folders(tmp_path: Path) -> None:
    pairs = read_pairs(fill(tmp_path, "cover.png", "cat/0.png", "dog/0.png"))
    expected = [("cat/0.png", ["cat"], "cat"), ("cover.png", [], ""), ("dog/0.png", ["dog"], "dog")]
    assert rows(pairs, "captions", "label") == expected
    assert pairs.source == "a tree of 2 class folders, 1 images without a caption"


def test_pictures_deeper_in_a_class(tmp_path: Path) -> None:
    fill(tmp_path, "cat/0.png", "cat/more/9.png", "cat/more/deep/1.png", "dog/0.png")
    assert rows(read_pairs(tmp_path), "label") == [
        ("cat/0.png", "cat"),
        ("cat/more/9.png", "cat"),
        ("cat/more/deep/1.png", "cat"),
        ("dog/0.png", "dog"),
    ]
    evaluated = read_set(tmp_path, "classification")
    assert sorted(evaluated.keys) == ["cat/0.png", "cat/more/9.png", "cat/more/deep/1.png", "dog/0.png"]
    assert evaluated.labels.tolist() == [0, 0, 0, 1]


def test_pictures_below_loose_ones(tmp_path: Path) -> None:
    assert [key for (key,) in rows(read_pairs(fill(tmp_path, "a.png", "b/c/d.png")))] == ["a.png", "b/c/d.png"]


@pytest.mark.parametrize("names", [("train", "validation"), ("Training", "dev"), ("train", "eval")])
def test_classes_in_splits(names: tuple[str, str], tmp_path: Path) -> None:
    train, val = names
    pairs = read_pairs(fill(tmp_path, f"{train}/cat/0.png", f"{train}/dog/1.png", f"{val}/cat/0.png"))
    assert rows(pairs, "label", "split") == sorted(
        [
            (f"{train}/cat/0.png", "cat", "train"),
            (f"{train}/dog/1.png", "dog", "train"),
            (f"{val}/cat/0.png", "cat", "val"),
        ]
    )
    assert pairs.source == "a tree of 2 class folders of 2 splits"
    assert len(read_pairs(tmp_path, split=[val])) == 1


def test_pictures_in_splits(tmp_path: Path) -> None:
    """Splits are no classes; a class may be called as a split is, beside others that are not."""
    assert rows(read_pairs(fill(tmp_path / "a", "train/0.png", "test/0.png")), "captions", "split") == [
        ("test/0.png", [], "test"),
        ("train/0.png", [], "train"),
    ]
    vehicles = read_pairs(fill(tmp_path / "b", "train/0.png", "bus/0.png"))
    assert rows(vehicles, "label") == [("bus/0.png", "bus"), ("train/0.png", "train")]


def test_texts_beside_pictures_in_folders(tmp_path: Path) -> None:
    fill(tmp_path, "train/0.png", "train/0.txt:a dog", "test/0.png", 'test/0.json:{"caption": "a cat"}')
    pairs = read_pairs(tmp_path)
    assert rows(pairs, "captions", "split") == [("test/0.png", ["a cat"], "test"), ("train/0.png", ["a dog"], "train")]
    assert pairs.source == "a tree of 2 folders of 2 splits with captions beside the images"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_of_imagefolder(kind: str, tmp_path: Path) -> None:
    """metadata.csv and its like in each folder, as Hugging Face's ImageFolder has them."""
    for split in ("train", "validation"):
        fill(tmp_path, f"{split}/0.png", f"{split}/unnamed.png")
        row = {"file_name": "0.png", "text": f"a dog of {split}"}
        if kind == "parquet":
            pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / split / "metadata.parquet")
        else:
            text = f"{json.dumps(row)}\n" if kind == "jsonl" else f"{','.join(row)}\n{','.join(row.values())}\n"
            (tmp_path / split / f"metadata.{kind}").write_text(text)
    for pairs in (read_pairs(tmp_path), read_pairs(tmp_path, caption_columns=["text"])):
        assert rows(pairs, "captions", "split") == [
            ("train/0.png", ["a dog of train"], "train"),
            ("validation/0.png", ["a dog of validation"], "val"),
        ]
        assert "2 images that it does not name" in pairs.source
    with pytest.raises(DataError, match="no column 'txt'"):
        read_pairs(tmp_path, caption_columns=["txt"])


def test_a_table_for_each_split(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "1.png", "train.csv:image,caption\n0.png,a dog\n", "dev.csv:image,caption\n1.png,a cat\n")
    assert rows(read_pairs(tmp_path), "captions", "split") == [
        ("0.png", ["a dog"], "train"),
        ("1.png", ["a cat"], "val"),
    ]


def test_splits_in_the_paths_of_a_table(tmp_path: Path) -> None:
    fill(tmp_path, "train/0.png", "valid/1.png", "metadata.csv:file_name,text\ntrain/0.png,a dog\nvalid/1.png,a cat\n")
    assert rows(read_pairs(tmp_path), "split") == [("train/0.png", "train"), ("valid/1.png", "val")]


def test_splits_in_folders_of_shards(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_tar(tmp_path / "tars" / split / "0.tar", sample("1", NAMES[0]))
        (tmp_path / "hub" / split).mkdir(parents=True)
        pa.parquet.write_table(hub_table(NAMES[:1]), tmp_path / "hub" / split / "0000.parquet")
    for kind in ("tars", "hub"):
        assert read_pairs(tmp_path / kind).table["split"].to_pylist() == ["train", "val"]
    write_tar(tmp_path / "one" / "train" / "0.tar", sample("1", NAMES[0]))
    assert "split" not in read_pairs(tmp_path / "one").table.column_names


def test_splits_that_are_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, "0.png", "1.png", "t.csv:image,caption,split\n0.png,a dog,train\n1.png,a cat,\n")
    say_pairs(read_pairs(tmp_path))
    assert "1 images are in no split" in capsys.readouterr().err


def test_files_without_rows(tmp_path: Path) -> None:
    for name, rows_of in (("train", NAMES[:2]), ("validation", [])):
        pa.parquet.write_table(hub_table(rows_of), tmp_path / f"{name}-00000-of-00001.parquet")
    assert read_pairs(tmp_path).source.endswith(", 1 file without rows (validation-00000-of-00001)")


def test_pictures_in_folders_without_a_table(tmp_path: Path) -> None:
    fill(tmp_path, "train/0.png", "train/metadata.csv:file_name,text\n0.png,a dog\n", "test/1.png", "2.png")
    pairs = read_pairs(tmp_path)
    assert rows(pairs) == [("train/0.png",)]
    assert "2 images that it does not name" in pairs.source


def test_pictures_that_a_table_does_not_name(tmp_path: Path) -> None:
    fill(tmp_path, "t.csv:image,caption\nin/0.png,a dog\n", "in/0.png", "in/1.png", "out/2.png", "3.png")
    assert "3 images that it does not name" in read_pairs(tmp_path).source
    assert "1 images that it does not name" in read_pairs(tmp_path / "t.csv").source


def test_pictures_beside_shards(tmp_path: Path) -> None:
    write_tar(fill(tmp_path, "a.png") / "0.tar", sample("1", NAMES[0]))
    assert read_pairs(tmp_path).source == f"1 webdataset shard in {tmp_path}, 1 images beside them left out"


@pytest.mark.parametrize(
    "option", [{"images": "/nowhere"}, {"image_column": "x"}, {"caption_columns": ["x"]}, {"split_column": "x"}]
)
def test_options_that_mean_nothing(option: dict[str, object], tmp_path: Path) -> None:
    fill(tmp_path, "tree/cat/0.png", "flat/0.png", 'flat/0.json:{"caption": "a dog"}')
    for kind in ("tree", "flat"):
        with pytest.raises(DataError, match=r"--(images|image-column|caption-column|split-column)"):
            read_pairs(tmp_path / kind, **option)  # type: ignore[arg-type]


def test_columns_of_shards_that_are_not_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("1", NAMES[0]))
    for option in ({"caption_columns": ["nosuch"]}, {"split_column": "fold"}, {"lang_column": "tongue"}):
        with pytest.raises(DataError, match="no image in|names nothing in"):
            read_pairs(tmp_path, **option)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"--images \. means nothing"):
        read_pairs(tmp_path, images=".")


def test_the_folder_of_images(tmp_path: Path) -> None:
    """--images may name the folder around the one that paths begin in; one with none of the images is refused."""
    fill(tmp_path, "ph/images/0.png", "ph/t.csv:image,caption\n0.png,a dog\n", "empty/1.png")
    pairs = read_pairs(tmp_path / "ph" / "t.csv", images=tmp_path / "ph")
    assert pairs.table["path"].to_pylist() == [f"{tmp_path}/ph/images/0.png"]
    with pytest.raises(DataError, match="none of the images .* in --images"):
        read_pairs(tmp_path / "ph" / "t.csv", images=tmp_path / "empty")
