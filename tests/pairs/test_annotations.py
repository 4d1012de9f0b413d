from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.pairs.packed import NAMES, picture

from litune.errors import DataError
from litune.pairs.pairs import read_pairs


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """annotations/captions_*.json beside the images of each split."""
    (tmp_path / "annotations").mkdir()
    for split, names in (("train2017", NAMES[:4]), ("val2017", NAMES[4:6])):
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / f"{name}.png").write_bytes(picture(name))
        facts = {
            "images": [{"id": 100 + i, "file_name": f"{n}.png", "license": i} for i, n in enumerate(names)],
            # Not in the images' order, and one image without any.
            "annotations": [
                {"image_id": 100 + i, "id": i, "caption": f"{word} {names[i]}\n"}
                for word in ("a", "one")
                for i in range(len(names) - 1)
            ],
        }
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(facts))
    return tmp_path


def test_coco(coco: Path) -> None:
    val = read_pairs(coco / "annotations" / "captions_val2017.json", keep=["license"])
    assert val.table["path"].to_pylist() == [f"{coco}/val2017/{name}.png" for name in NAMES[4:6]]
    assert val.table["captions"].to_pylist() == [[f"a {NAMES[4]}", f"one {NAMES[4]}"], []]
    assert val.table["license"].to_pylist() == [0, 1]
    assert val.source == "COCO's captions in captions_val2017.json, 1 images without a caption"
    both = read_pairs(coco)
    assert both.table["split"].to_pylist() == ["train"] * 4 + ["val"] * 2
    assert all(Path(path).is_file() for path in both.table["path"].to_pylist())


def test_images_two_folders_deep(coco: Path) -> None:
    (coco / "pictures").mkdir()
    (coco / "val2017").rename(coco / "pictures" / "val2017")
    pairs = read_pairs(coco / "annotations" / "captions_val2017.json")
    assert pairs.table["path"].to_pylist() == [f"{coco}/pictures/val2017/{name}.png" for name in NAMES[4:6]]


def test_damaged_coco(coco: Path) -> None:
    file = coco / "annotations" / "captions_val2017.json"
    facts = json.loads(file.read_text())
    facts["annotations"] += [
        {"caption": "whose?"},
        3,
        {"image_id": 999, "caption": "gone"},
        {"image_id": 101, "caption": 7},
    ]
    facts["images"] += [{"id": 7}, None]
    file.write_text(json.dumps(facts))
    pairs = read_pairs(file, max_damaged=0.9)
    assert len(pairs) == 1
    assert sorted(damage.reason for damage in pairs.damaged) == [
        "it has no id and file_name",
        "it has no id and file_name",
        "it has no image_id and caption",
        "it has no image_id and caption",
        "the caption is 7, expected a string",
        "there is no such image in the file",
    ]


def test_karpathy(tmp_path: Path) -> None:
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    rows = []
    for i, name in enumerate(NAMES[:3]):
        (tmp_path / "images" / "val2014" / f"{name}.png").write_bytes(picture(name))
        sentences = [{"raw": f"a {name}", "tokens": ["a", name]}, {"raw": f"one {name}"}]
        rows.append(
            {
                "filename": f"{name}.png",
                "filepath": "val2014",
                "split": ("train", "val", "restval")[i],
                "sentences": sentences,
            }
        )
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    for source in (tmp_path, tmp_path / "dataset_coco.json"):
        pairs = read_pairs(source)
        assert pairs.table["split"].to_pylist() == ["train", "val", "restval"]
        assert pairs.table["captions"][1].as_py() == [f"a {NAMES[1]}", f"one {NAMES[1]}"]
        assert pairs.table["path"][0].as_py() == f"{tmp_path}/images/val2014/{NAMES[0]}.png"
    assert pairs.source.startswith("Karpathy's captions")


@pytest.mark.parametrize("text", ["", "[1]", '{"images": 3}', '{"images": [', "[" * 100_000])
def test_other_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "captions_x.json").write_text(text)
    with pytest.raises(DataError, match="captions_x.json (can't be read as JSON|has no list of images)"):
        read_pairs(tmp_path)
