from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from tests.conftest import COLORS, SHAPES, draw
from tests.pairs import packed

from litune.errors import DataError
from litune.image.pictures import open_rgb
from litune.pairs.benchmarks import EvalSet, read_set
from litune.pairs.cifar import read_batch
from litune.pairs.reference import file_of, is_there, read_bytes

Rows = list[tuple[str, str]]


def picture(color: str, shape: str = "box", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    draw(color, shape).save(out, kind)
    return out.getvalue()


def shown(found: EvalSet) -> list[tuple[str, bytes]]:
    """The class of each image with its decoded pixels."""
    return [
        (found.classes[label], open_rgb(read_bytes(one)).tobytes())
        for label, one in zip(found.labels, found.pictures, strict=True)
    ]


EXPECTED = [(color, draw(color, shape).tobytes()) for color in COLORS for shape in SHAPES]


@pytest.mark.parametrize("where", ["", "val", "images/test"])
def test_trees(class_tree: Path, where: str) -> None:
    root = class_tree
    if where:
        root = class_tree.parent / "set"
        (root / where).parent.mkdir(parents=True)
        class_tree.rename(root / where)
        (root / "train" / "red").mkdir(parents=True)
    found = read_set(root, "classification")
    assert sorted(shown(found)) == sorted(EXPECTED)
    assert found.keys[0] == "blue/bar.png"


def test_flat_folder_of_wordnet_ids(tmp_path: Path) -> None:
    for wnid, color in (("n02", "red"), ("n01", "blue")):
        draw(color, "box").save(tmp_path / f"{wnid}443537_{color}.png")
    found = read_set(tmp_path, "classification")
    assert found.classes == ["n01443537", "n02443537"]
    assert shown(found) == [("n01443537", draw("blue", "box").tobytes()), ("n02443537", draw("red", "box").tobytes())]


def write_shards(root: Path, rows: list[dict[str, bytes]], split: str = "test", per_shard: int = 2) -> None:
    (root / split).mkdir(parents=True)
    shards = [rows[i : i + per_shard] for i in range(0, len(rows), per_shard)]
    for number, shard in enumerate(shards):
        with tarfile.open(root / split / f"{number}.tar", "w") as tar:
            for i, row in enumerate(shard):
                for extension, data in row.items():
                    member = tarfile.TarInfo(f"s{number}{i}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (root / split / "nshards.txt").write_text(f"{len(shards)}\n")


def test_webdataset(tmp_path: Path) -> None:
    rows = [{"webp" if i else "png": picture(c), "cls": b"%d" % i} for i, c in enumerate(["red", "blue", "green"])]
    rows[1]["webp"] = picture("blue", kind="PNG")
    write_shards(tmp_path, rows)
    (tmp_path / "classnames.txt").write_text("red\nblue\ngreen\nyellow\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c} thing\n{c}\n")
    found = read_set(tmp_path, "classification")
    assert found.classes == ["red", "blue", "green", "yellow"]
    assert found.templates == ("a {} thing", "{}")
    assert [name for name, _ in shown(found)] == ["red", "blue", "green"]
    assert shown(found)[1][1] == draw("blue", "box").tobytes()
    (tmp_path / "test" / "1.tar").write_bytes(b"x" * 600)
    with pytest.raises(DataError, match=r"1\.tar is damaged"):
        read_set(tmp_path, "classification")
    (tmp_path / "test" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar is missing"):
        read_set(tmp_path, "classification")


def test_webdataset_written_by_clip_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own converter writes the shards."""
    import torch
    from clip_benchmark.webdataset_builder import convert_dataset  # type: ignore[import-untyped]

    class Pictures(list[Any]):
        classes, templates = ("red", "blue"), ("a {c} thing",)

    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda data, **_: data)  # no worker processes
    data = Pictures([(picture("red"), 0), (picture("blue"), 1)])
    convert_dataset(data, "test", str(tmp_path / "set"), image_format="png", verbose=False)
    found = read_set(tmp_path / "set", "classification")
    assert shown(found) == [("red", draw("red", "box").tobytes()), ("blue", draw("blue", "box").tobytes())]


def test_webdataset_of_captions(tmp_path: Path) -> None:
    write_shards(
        tmp_path, [{"jpg": picture("red"), "txt": b"a red box\nred"}, {"jpg": picture("blue"), "txt": b"blue"}]
    )
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    found = read_set(tmp_path, "retrieval")
    assert found.captions == [["a red box", "red"], ["blue"]]
    named = "".join(f"{key}\0{len(read_bytes(one))}\0" for key, one in zip(found.keys, found.pictures, strict=True))
    assert found.fingerprint() == hashlib.sha256(named.encode()).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """CIFAR-10's folder with four images a batch, as its authors' pickles are."""
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {b"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [3, 0, 1, 3]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [b"airplane", b"automobile", b"bird", b"cat"]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    return tmp_path / "cifar10"


def test_cifar(cifar: Path) -> None:
    found = read_set(cifar, "classification")
    assert [found.classes[i] for i in found.labels] == ["cat", "airplane", "automobile", "cat"]
    data = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())[b"data"]
    pixels = np.asarray(open_rgb(read_bytes(found.pictures[2])))
    assert (pixels == data[2].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert len(read_set(cifar, "classification", splits=("train",))) == 20
    stamps = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in data]  # as features were kept before
    named = "".join(f"{key}\0{stamp}\0" for key, stamp in zip(found.keys, stamps, strict=True))
    assert found.fingerprint() == hashlib.sha256(named.encode()).hexdigest()
    reference = found.pictures[2]
    assert (file_of(reference), is_there(reference)) == (reference.removesuffix("::2::pixels"), True)
    with pytest.raises(DataError, match="has changed: it has no row 4 any more"):
        read_bytes(reference.replace("::2::", "::4::"))
    with pytest.raises(DataError, match=r"batches\.meta has no data of 3 × 32 × 32 pixels"):
        read_bytes(reference.replace("test_batch", "batches.meta"))


class Bad:
    def __reduce__(self) -> Any:
        return os.system, ("echo called > called.txt",)


def test_a_pickle_runs_nothing(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": Bad()}))
    with pytest.raises(DataError, match=r"asks for \w+\.system.*plain arrays"):
        read_set(cifar, "classification")
    assert not (tmp_path / "called.txt").exists()


def test_a_pickle_with_protocol_5_and_new_numpy(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(pickle.dumps({"data": np.arange(6).reshape(2, 3)}, protocol=2))
    assert read_batch(tmp_path / "b")["data"].tolist() == [[0, 1, 2], [3, 4, 5]]


def hub_table(rows: Rows, **columns: Any) -> pa.Table:
    images = [{"bytes": picture(color), "path": f"{name}.png"} for name, color in rows]
    return pa.table({"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), **columns})


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    label = {"_type": "ClassLabel", "names": ["red", "green", "blue"]}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    table = hub_table([("a", "blue"), ("b", "red"), ("c", "blue")], label=[2, 0, 2])
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    (tmp_path / "data").mkdir()
    pa.parquet.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet", row_group_size=2)
    pa.parquet.write_table(table.slice(0, 1), tmp_path / "data" / "train-00000-of-00001.parquet")
    found = read_set(tmp_path, "classification")
    assert found.classes == ["red", "green", "blue"]
    assert shown(found) == [(c, draw(c, "box").tobytes()) for c in ("blue", "red", "blue")]
    assert found.keys[2] == "test-00000-of-00001/000002/c.png"
    assert len(read_set(tmp_path, "classification", splits=("train",))) == 1


def test_parquet_of_captions_and_splits(tmp_path: Path) -> None:
    rows = [("a", "red"), ("b", "blue"), ("c", "green")]
    table = hub_table(rows, caption=[["red", "a box"], ["blue"], ["green"]], split=["test", "train", "test"])
    pa.parquet.write_table(table, tmp_path / "all.parquet")
    assert read_set(tmp_path, "retrieval").captions == [["red", "a box"], ["green"]]


def test_parquet_with_numbers_as_names_keeps_their_order(tmp_path: Path) -> None:
    label = {"_type": "ClassLabel", "names": ["0", "10", "2"]}  # as folders of these names are sorted
    table = hub_table([("a", "red"), ("b", "blue"), ("c", "green")], label=[1, 2, 0])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"label": label}}})})
    pa.parquet.write_table(table, tmp_path / "all.parquet")
    found = read_set(tmp_path, "classification")
    assert [found.classes[i] for i in found.labels] == ["10", "2", "0"]
    hidden = table.set_column(1, "label", pa.array([1, -1, 0]))
    pa.parquet.write_table(hidden, tmp_path / "all.parquet")
    with pytest.raises(DataError, match=r"no class, or one that is none of its 3, for image 2"):
        read_set(tmp_path, "classification")


def test_a_parquet_row_without_a_picture_counts_as_damaged(tmp_path: Path) -> None:
    table = hub_table([("a", "red"), ("b", "blue")], label=["x", "y"], langs=["en", "de"], caption=["r", "b"])
    without = pa.array([{"bytes": picture("red"), "path": "a.png"}, None], table["image"].type)
    pa.parquet.write_table(table.set_column(0, "image", without), tmp_path / "all.parquet")
    found = read_set(tmp_path, "classification")
    assert found.keys == ["all/000000/a.png", "all/000001"]
    with pytest.raises(DataError, match="the cell has no picture"):
        read_bytes(found.pictures[1])
    described = read_set(tmp_path, "retrieval")
    assert (described.captions, described.languages) == ([["r"], ["b"]], ["de", "en"])
    assert described.in_language("de").keys == ["all/000001"]


def test_other_pairs_are_sets_as_well(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"png": picture(c), "cls": c.encode(), "json": b"{}"} for c in ("red", "blue")])
    (tmp_path / "test" / "nshards.txt").unlink()
    found = read_set(tmp_path, "classification")
    assert shown(found) == [("red", draw("red", "box").tobytes()), ("blue", draw("blue", "box").tobytes())]
    with pytest.raises(DataError, match="for the split train"):  # these are the images to be tested on
        read_set(tmp_path, "classification", splits=("train",))
    with pytest.raises(DataError, match="no images with captions"):  # names of classes are no captions
        read_set(tmp_path, "retrieval")
    folder = tmp_path / "texts"
    folder.mkdir()
    draw("red", "box").save(folder / "a.png")
    (folder / "a.txt").write_text("a red box")
    assert read_set(folder, "retrieval").captions == [["a red box"]]


@pytest.fixture
def two_photos(tmp_path: Path) -> Path:
    (tmp_path / "val2014").mkdir()
    for color in ("red", "blue"):
        draw(color, "box").save(tmp_path / "val2014" / f"{color}.png")
    return tmp_path


def test_karpathy(two_photos: Path) -> None:
    images = [
        {"filepath": "val2014", "filename": f"{c}.png", "split": s, "sentences": [{"raw": f" {c} "}, {"raw": "box"}]}
        for c, s in (("red", "test"), ("blue", "train"))
    ]
    (two_photos / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    found = read_set(two_photos, "retrieval")
    assert found.captions == [["red", "box"]]
    assert found.pictures == [str(two_photos / "val2014" / "red.png")]


def test_karpathy_without_the_folder_that_it_names(two_photos: Path) -> None:
    (two_photos / "images").mkdir()
    (two_photos / "val2014").rename(two_photos / "images" / "all")
    image = {"filepath": "val2014", "filename": "red.png", "split": "test", "sentences": [{"raw": "red"}]}
    (two_photos / "dataset_coco.json").write_text(json.dumps({"images": [image]}))
    found = read_set(two_photos, "retrieval")
    assert (found.keys, found.pictures) == (["val2014/red.png"], [str(two_photos / "images" / "all" / "red.png")])
    (two_photos / "images" / "all" / "red.png").unlink()
    with pytest.raises(DataError, match=r"no folder in it has their images \(the first: val2014/red.png\)"):
        read_set(two_photos, "retrieval")


def test_coco_form(two_photos: Path) -> None:
    images = [{"id": 7, "file_name": "red.png"}, {"id": 9, "file_name": "blue.png"}]
    said = [{"image_id": 9, "caption": "blue"}, {"image_id": 7, "caption": "red"}, {"image_id": 9, "caption": "sky"}]
    file = two_photos / "coco_test_karpathy.json"
    file.write_text(json.dumps({"images": images, "annotations": said}))
    found = read_set(two_photos, "retrieval")
    assert (found.keys, found.captions) == (["red.png", "blue.png"], [["red"], ["blue", "sky"]])
    file.write_text(json.dumps({"images": images, "annotations": [{"image_id": 1}]}))
    with pytest.raises(DataError, match="not COCO's"):
        read_set(two_photos, "retrieval")


def test_lines_of_captions(two_photos: Path) -> None:
    (two_photos / "flickr8k_test_karpathy.txt").write_text("image,caption\nred.png,A box, red .\nred.png,red\n")
    assert read_set(two_photos, "retrieval").captions == [["A box, red .", "red"]]


def test_tables(photos: Path) -> None:
    found = read_set(photos, "retrieval")
    assert len(found) == 6  # the split val
    assert found.languages == ["de", "en"]
    german = found.in_language("de")
    assert all(len(one) == 1 and " in " in one[0] for one in german.captions)
    with pytest.raises(DataError, match=r"no captions in 'dee' \(perhaps you meant 'de'\)"):
        found.in_language("dee")


def test_a_table_of_classes(photos: Path) -> None:
    (photos / "captions.csv").unlink()
    (photos / "labels.csv").write_text("image,label\nred-box-0.png,red\nblue-box-0.png,blue\nred-bar-0.png,red\n")
    found = read_set(photos, "classification")
    assert [found.classes[i] for i in found.labels] == ["red", "blue", "red"]


def test_dtd_and_pets(tmp_path: Path) -> None:
    for name in ("dtd/dtd/images/dotted", "dtd/dtd/labels", "pets/images", "pets/annotations"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dtd/dtd/labels/test1.txt").write_text("dotted/dotted_1.jpg\n")
    draw("red", "box").save(tmp_path / "dtd/dtd/images/dotted/dotted_1.jpg")
    assert read_set(tmp_path / "dtd", "classification").classes == ["dotted"]
    (tmp_path / "pets/annotations/test.txt").write_text("Abyssinian_1 1 1 1\nsaint_bernard_2 2 2 1\n")
    found = read_set(tmp_path / "pets", "classification")
    assert (found.classes, found.labels.tolist()) == (["Abyssinian", "saint_bernard"], [0, 1])


def test_fingerprint_follows_the_images_not_their_labels(class_tree: Path) -> None:
    found = read_set(class_tree, "classification")
    before = found.fingerprint()
    (class_tree / "red").rename(class_tree / "crimson")
    assert read_set(class_tree, "classification").fingerprint() != before  # other names
    (class_tree / "crimson").rename(class_tree / "red")
    assert read_set(class_tree, "classification").fingerprint() == before
    Image.new("RGB", (9, 9)).save(class_tree / "red" / "box.png")
    assert read_set(class_tree, "classification").fingerprint() != before
    assert found.subset([1, 2]).keys == found.keys[1:3]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no evaluation set"):
        read_set(tmp_path / "nowhere", "classification")
    with pytest.raises(DataError, match=r"no classes in a layout"):
        read_set(tmp_path, "classification")


@pytest.mark.parametrize("asked", ["val", "dev", "validation"])
def test_other_names_of_splits(asked: str, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "tree" / split / "red").mkdir(parents=True)
        (tmp_path / "tree" / split / "red" / f"{split}.png").write_bytes(picture("red"))
        (tmp_path / "hub").mkdir(exist_ok=True)
        pa.parquet.write_table(packed.hub_table(packed.NAMES[:2]), tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    assert read_set(tmp_path / "tree", "classification", splits=[asked]).keys == ["red/validation.png"]
    assert read_set(tmp_path / "hub", "retrieval", splits=[asked]).keys[0].startswith("validation-00000")
