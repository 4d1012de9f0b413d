from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.conftest import draw

from litune.errors import DataError
from litune.pairs.pairs import read_pairs

ROWS = [
    ("a.png", "train", "en", "a red box"),
    ("b.png", "val", "en", 'said "hello", twice'),
    ("a.png", "train", "de", "eine rote Kiste"),
    ("a.png", "train", "en", "12345"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        draw("red", "box").save(tmp_path / "images" / name)
    return tmp_path


def write(folder: Path, kind: str) -> Path:
    file = folder / f"captions.{kind}"
    names = ("image", "split", "lang", "caption")
    if kind == "csv":
        text = "\n".join(",".join('"' + v.replace('"', '""') + '"' for v in row) for row in [names, *ROWS])
        file.write_text("\ufeff" + text, encoding="utf-8")
    elif kind == "tsv":
        file.write_text("\n".join("\t".join(row) for row in [names, *ROWS]), encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
        file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        pa.parquet.write_table(pa.Table.from_pylist([dict(zip(names, r, strict=True)) for r in ROWS]), file)
    return file


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(folder: Path, kind: str) -> None:
    write(folder, kind)
    pairs = read_pairs(folder)
    assert pairs.table["key"].to_pylist() == ["a.png", "b.png"]
    assert pairs.table["captions"].to_pylist() == [["a red box", "eine rote Kiste", "12345"], ['said "hello", twice']]
    assert pairs.table["langs"].to_pylist() == [["en", "de", "en"], ["en"]]
    assert pairs.table["split"].to_pylist() == ["train", "val"]
    assert all(Path(p).is_file() for p in pairs.table["path"].to_pylist())
    assert pairs.captions == 4
    assert not pairs.damaged


def test_same_pairs_same_fingerprint_in_any_format(folder: Path) -> None:
    found = {read_pairs(write(folder, kind)).fingerprint() for kind in ("csv", "tsv", "jsonl", "parquet")}
    assert len(found) == 1
    (folder / "captions.csv").write_text("image,caption\na.png,a red box\n")
    assert read_pairs(folder / "captions.csv").fingerprint() not in found


def test_lists_of_captions(folder: Path) -> None:
    lines = [{"image": "a.png", "caption": ["one", "two"]}, {"image": "b.png", "caption": ["three"]}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_pairs(folder).table["captions"].to_pylist() == [["one", "two"], ["three"]]


def test_select(folder: Path) -> None:
    write(folder, "csv")
    train = read_pairs(folder, split=["train"], lang=["de"])
    assert train.table["captions"].to_pylist() == [["eine rote Kiste"]]
    assert train.table["key"].to_pylist() == ["a.png"]
    with pytest.raises(DataError, match=r"no image is in the split 'trian' \(perhaps you meant 'train'\)"):
        read_pairs(folder, split=["trian"])
    with pytest.raises(DataError, match="no caption is in the language 'fr'"):
        read_pairs(folder, lang=["fr"])


def test_columns(folder: Path) -> None:
    (folder / "t.csv").write_text("photo,words\na.png,x\n")
    with pytest.raises(DataError, match=r"no column of image paths .* photo, words with --image-column"):
        read_pairs(folder)
    with pytest.raises(DataError, match=r"no column 'word' \(perhaps you meant 'words'\)"):
        read_pairs(folder, image_column="photo", caption_columns=["word"])
    assert len(read_pairs(folder, image_column="photo", caption_columns=["words"])) == 1


def test_class_folders(class_tree: Path) -> None:
    pairs = read_pairs(class_tree)
    assert pairs.table["key"][0].as_py() == "blue/bar.png"
    assert pairs.table["label"][0].as_py() == "blue"
    assert pairs.table["captions"][0].as_py() == ["blue"]
    assert len(pairs) == 12
    with pytest.raises(DataError, match=f"perhaps you meant {class_tree}"):
        read_pairs(class_tree.parent)


def test_images_alone(folder: Path) -> None:
    pairs = read_pairs(folder / "images")
    assert pairs.table["key"].to_pylist() == ["a.png", "b.png"]
    assert pairs.captions == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "image,caption\n", "has no rows"),
        ("t.jsonl", "\n", "has no rows"),
        ("t.jsonl", '{"image": \n', "row 1 of t.jsonl: the line is not JSON"),
        ("t.jsonl", "[1]\n", "row 1 of t.jsonl: the line holds a list"),
        ("t.csv", "image,caption,caption\na,b,c\n", "'caption' more than once"),
        ("t.csv", "image,caption\na.png,x,y\n", "row 1 of t.csv: it has 3 cells, the table has 2 columns"),
        ("t.csv", "image,caption\nmissing.png,x\n", "none of the images"),
        ("t.csv", "image,split,caption\na.png,train,x\na.png,val,y\n", "is in the splits 'train' and 'val'"),
        ("t.jsonl", '{"image": "a.png", "caption": 3}', "the caption is 3, expected a string"),
    ],
)
def test_bad_tables(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_pairs(folder)


def test_not_utf8(folder: Path) -> None:
    """A table with much that is UTF-8 and some that is not is damaged UTF-8."""
    lines = b"a.png,Caf\xe9\n" + "a.png,Café\n".encode() * 5
    (folder / "t.csv").write_bytes(b"image,caption\n" + lines)
    with pytest.raises(DataError, match="the caption is not UTF-8"):
        read_pairs(folder)
    (folder / "t.csv").unlink()
    (folder / "t.jsonl").write_bytes(b'{"image": "a.png", "caption": "Caf\xe9, \xc3\xa9, \xc3\xa9"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        read_pairs(folder)


def test_few_bad_captions_are_skipped_by_name(folder: Path) -> None:
    lines = [json.dumps({"image": "a.png", "caption": f"caption {i}"}) for i in range(200)]
    lines[7] = json.dumps({"image": "a.png", "caption": 7})
    (folder / "t.jsonl").write_text("\n".join(lines))
    pairs = read_pairs(folder)
    assert pairs.captions == 199
    assert [d.key for d in pairs.damaged] == ["row 8 of t.jsonl (a.png)"]
    with pytest.raises(DataError, match=r"1 of 200 inputs .* raise --max-damaged"):
        read_pairs(folder, max_damaged=0.001)


def test_a_folder_that_looks_like_a_pattern(folder: Path) -> None:
    write(folder, "csv")
    named = folder.rename(folder.parent / "photos [2020] {a,b}")
    assert len(read_pairs(named)) == 2
    assert len(read_pairs(named / "captions.csv")) == 2


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_pairs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images, no table"):
        read_pairs(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not a table"):
        read_pairs(tmp_path / "notes.txt")


def test_lists_of_languages_and_empty_lists(folder: Path) -> None:
    lines = [
        {"image": "a.png", "caption": ["a box", "eine Kiste"], "lang": ["en", "de"]},
        {"image": "b.png", "caption": [], "lang": []},
        *({"image": "b.png", "caption": [f"box {i}"], "lang": "en"} for i in range(200)),
    ]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = read_pairs(folder)
    assert pairs.table["langs"][0].as_py() == ["en", "de"]
    assert not pairs.damaged
    (folder / "c.jsonl").write_text(json.dumps({"image": "a.png", "caption": []}))
    assert read_pairs(folder).table["captions"].to_pylist() == [[]]
    (folder / "c.jsonl").write_text(json.dumps(lines[0] | {"lang": ["en"]}))
    with pytest.raises(DataError, match="2 captions but 1 languages"):
        read_pairs(folder)


def test_here(class_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(class_tree)
    assert len(read_pairs(Path())) == 12


def test_text_fields(folder: Path) -> None:
    """Several caption columns are fields of their own; a row may lack some of them."""
    lines = ["image\ttitle\ttags", "a.png\tred box\tred, box", "b.png\t\tred", "a.png\tanother\t", "b.png\t\t"]
    (folder / "captions.tsv").write_text("\n".join(lines), encoding="utf-8")
    pairs = read_pairs(folder, caption_columns=("title", "tags"))
    assert pairs.table["captions"].to_pylist() == [["red box", "red, box", "another"], ["red"]]
    assert pairs.table["fields"].to_pylist() == [["title", "tags", "title"], ["tags"]]
    assert not pairs.damaged
    one = read_pairs(folder, caption_columns=("tags",))
    assert "fields" not in one.table.column_names
    assert one.table["captions"].to_pylist() == [["red, box"], ["red"]]
    assert one.fingerprint() != pairs.fingerprint()


def test_a_table_of_paths_alone(folder: Path) -> None:
    """Paths, and numbers and classes beside them, are pairs; a column that may be of captions is not passed over."""
    file = folder / "t.csv"
    file.write_text("image\na.png\nb.png\n")
    assert read_pairs(file).table["captions"].to_pylist() == [[], []]
    file.write_text("image,price,split\na.png,1.5,train\nb.png,-2e3,val\n")
    assert read_pairs(file).table["split"].to_pylist() == ["train", "val"]
    file.write_text("image,Label\na.png,Red_Box\nb.png,blue\n")
    table = read_pairs(file).table
    assert table["label"].to_pylist() == ["Red_Box", "blue"]
    assert table["captions"].to_pylist() == [["red box"], ["blue"]]
    file.write_text("image,price,alt\na.png,1,a red box\n")
    with pytest.raises(DataError, match=r"no column of captions .* --caption-column"):
        read_pairs(file)
