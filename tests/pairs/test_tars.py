from __future__ import annotations

import json
import tarfile
from pathlib import Path

import fsspec
import pytest
from tests.pairs.packed import NAMES, picture, sample, write_shards, write_tar

from litune.errors import DataError
from litune.pairs import tars
from litune.pairs.pairs import read_pairs
from litune.pairs.reference import Member, read_bytes
from litune.pairs.sample import Damage


def test_img2datasets_shards(tmp_path: Path) -> None:
    pairs = read_pairs(write_shards(tmp_path), keep=("width", "key"))
    assert pairs.source == f"3 webdataset shards in {tmp_path}"
    assert pairs.table["key"][:2].to_pylist() == ["00000/000000000", "00000/000000001"]
    assert pairs.table["captions"].to_pylist() == [[f"a {name}"] for name in NAMES]
    assert pairs.table["url"][4].as_py() == f"http://example/{NAMES[4]}"
    assert pairs.table["width"].to_pylist() == [1] * 12
    assert [read_bytes(path) for path in pairs.table["path"].to_pylist()] == [picture(name) for name in NAMES]
    assert not pairs.damaged


def test_addresses(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    whole = read_pairs(tmp_path / "a").fingerprint()
    for address in ("{00000..00002}.tar", "*.tar", "0000?.tar"):
        assert read_pairs(f"{tmp_path}/a/{address}").fingerprint() == whole
        assert read_pairs(f"file://{tmp_path}/a/{address}").fingerprint() == whole
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "a").iterdir():
        memory.pipe(f"/litune-tars/{file.name}", file.read_bytes())
    assert read_pairs("memory://litune-tars").fingerprint() == whole
    memory.rm("/litune-tars", recursive=True)
    assert len(read_pairs(tmp_path / "a" / "00001.tar")) == 4
    with pytest.raises(DataError, match=r"1 of 4 files .*00003.tar: the shard does not exist; mend them"):
        read_pairs(f"{tmp_path}/a/{{00000..00003}}.tar")
    pairs = read_pairs(f"{tmp_path}/a/{{00000..00003}}.tar", max_damaged=0.3)
    assert [damage.reason for damage in pairs.damaged] == ["the shard does not exist"]
    with pytest.raises(DataError, match="different kinds"):
        read_pairs(f"{tmp_path}/a/00000.*")
    with pytest.raises(DataError, match="memory://nothing"):
        read_pairs("memory://nothing/there")


def test_captions_of_the_metadata(tmp_path: Path) -> None:
    facts = {
        "caption": "first",
        "orig_caption": "second",
        "captions": ["third", "fourth"],
        "split": "val",
        "lang": "en",
    }
    write_tar(tmp_path / "a.tar", sample("1", NAMES[0], **facts))
    assert read_pairs(tmp_path).table["captions"].to_pylist() == [[f"a {NAMES[0]}"]], "the text file comes first"
    for column, captions in (("orig_caption", ["second"]), ("captions", ["third", "fourth"])):
        pairs = read_pairs(tmp_path, caption_columns=(column,), split=("val",), lang=("en",))
        assert pairs.table["captions"].to_pylist() == [captions]
    both = read_pairs(tmp_path, caption_columns=("txt", "orig_caption"))
    assert both.table["fields"].to_pylist() == [["txt", "orig_caption"]]
    with pytest.raises(DataError, match="no 'similarity' to keep"):
        read_pairs(tmp_path, keep=("similarity",))
    write_tar(tmp_path / "a.tar", sample("1", NAMES[0], **facts)[:2])
    assert read_pairs(tmp_path).table["captions"].to_pylist() == [["first"]]


def test_samples(tmp_path: Path) -> None:
    """Names up to the first dot; several pictures of one sample; classes; what is no sample."""
    one, two = picture(NAMES[0]), picture(NAMES[1])
    write_tar(
        tmp_path / "train-0.tar",
        [
            ("README", b"no sample"),
            ("__meta__.json", b"{}"),
            ("./deep.er/a.1.seg.png", one),
            ("./deep.er/a.jpg", two),
            ("b.seg.png", one),
            ("c.jpg", one),
            ("c.cls", b"polar_bear\n"),
        ],
    )
    pairs = read_pairs(tmp_path)
    assert pairs.table["key"].to_pylist() == ["train-0/deep.er/a", "train-0/b", "train-0/c"]
    assert [read_bytes(path) == two for path in pairs.table["path"].to_pylist()] == [True, False, False]
    assert pairs.table["captions"].to_pylist() == [[], [], ["polar bear"]]
    assert pairs.table["split"].to_pylist() == ["train"] * 3
    with pytest.raises(DataError, match="a: the sample has no picture .seg.png, only .1.seg.png, .jpg"):
        read_pairs(tmp_path, image_column="seg.png")
    masks = read_pairs(tmp_path, image_column="seg.png", max_damaged=0.9)
    assert masks.table["key"].to_pylist() == ["train-0/b"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_as_pythons_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    names = ["a.png", "d" * 90 + "/" + "e" * 70 + ".png", "n" * 90 + ".png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["l" * 300 + ".png", "mädchen/😀.png", "f/" * 120 + "x.png"]
    file = write_tar(tmp_path / "a.tar", [(name, name.encode() * 7) for name in names], format=form)
    with tarfile.open(file) as tar:
        expected = [Member(str(file), m.offset_data, m.size, m.name) for m in tar.getmembers()]
    with open(file, "rb") as opened:
        assert list(tars.members(str(file), opened)) == expected
    assert [m.name for m in expected] == names


def test_large_numbers(tmp_path: Path) -> None:
    """Sizes of 8 GB and more are base-256 in GNU's headers, and in the extended header in pax's: no such file here."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("a.png")
        info.size = 9 << 30
        (tmp_path / "a.tar").write_bytes(info.tobuf(form))
        with open(tmp_path / "a.tar", "rb") as file:
            (found,) = tars.members("a.tar", file)
        assert isinstance(found, Damage)
        assert "ends in the middle" in found.reason


def test_links_and_devices_are_named_and_never_followed(tmp_path: Path) -> None:
    """A picture that is a link to a file outside, and members that would be written outside: nothing is unpacked."""
    (tmp_path / "secret.png").write_bytes(picture(NAMES[0]))
    odd = []
    for i, (kind, target) in enumerate(
        [
            (tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            (tarfile.LNKTYPE, str(tmp_path / "secret.png")),
            (tarfile.CHRTYPE, ""),
            (tarfile.BLKTYPE, ""),
            (tarfile.FIFOTYPE, ""),
        ]
    ):
        info = tarfile.TarInfo(f"{i}.png")
        info.type, info.linkname = kind, target
        odd.append(info)
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    good = [("../../escape.png", picture(NAMES[1])), ("/etc/escape.png", picture(NAMES[2]))]
    write_tar(tmp_path / "set" / "a.tar", [folder, *odd, *good])
    before = sorted(tmp_path.parent.rglob("*"))
    pairs = read_pairs(tmp_path / "set", max_damaged=0.9)
    kinds = ["a symbolic link", "a hard link", "a device", "a device", "a pipe"]
    assert [damage.reason for damage in pairs.damaged] == [f"it is {k}, not a file: never followed" for k in kinds]
    assert pairs.table["key"].to_pylist() == ["a/../../escape", "a//etc/escape"]
    assert [read_bytes(path) for path in pairs.table["path"].to_pylist()] == [picture(NAMES[1]), picture(NAMES[2])]
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_cut_off(tmp_path: Path) -> None:
    whole = (write_shards(tmp_path, shards=1) / "00000.tar").read_bytes()
    paths = read_pairs(tmp_path).table["path"].to_pylist()
    at = [int(path.split("::")[1].split("+")[0]) for path in paths]
    (tmp_path / "00000.tar").write_bytes(whole[: at[7] + 100])
    pairs = read_pairs(tmp_path, max_damaged=0.2)
    assert pairs.table["path"].to_pylist() == paths[:7]
    (damage,) = pairs.damaged
    assert damage.key.endswith("00000.tar::000000007.png")
    assert f"at byte {at[7] + 100:,}" in damage.reason


def test_cut_off_between_two_files(tmp_path: Path) -> None:
    """Nothing that is left is damaged, but the mark of the end is missing."""
    whole = (write_shards(tmp_path, shards=1) / "00000.tar").read_bytes()
    paths = read_pairs(tmp_path).table["path"].to_pylist()
    (tmp_path / "00000.tar").write_bytes(whole[: int(paths[7].split("::")[1].split("+")[0]) - 512])
    pairs = read_pairs(tmp_path, max_damaged=0.2)
    assert pairs.table["path"].to_pylist() == paths[:7]
    assert "the shard has no end" in pairs.damaged[0].reason


def test_it_goes_on_behind_damage(tmp_path: Path) -> None:
    whole = bytearray((write_shards(tmp_path, shards=1) / "00000.tar").read_bytes())
    paths = read_pairs(tmp_path).table["path"].to_pylist()
    at = int(paths[7].split("::")[1].split("+")[0])
    whole[at - 512 : at - 500] = b"nonsense here"[:12]
    (tmp_path / "00000.tar").write_bytes(whole)
    pairs = read_pairs(tmp_path, max_damaged=0.2)
    assert pairs.table["path"].to_pylist() == paths[:7] + paths[8:]
    reasons = [damage.reason for damage in pairs.damaged]
    assert "are no tar: what was there is lost" in reasons[0]
    assert reasons[1] == "the sample has no picture, only .json, .txt"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the shard is empty"),
        (b"<html>", "bytes 0 to 6 are no tar"),
        (b"\x1f\x8b" + bytes(600), "compressed with gzip: unpack it"),
        (b"PK\x03\x04" + bytes(600), "compressed with zip: unpack it"),
    ],
)
def test_no_tar(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=reason):
        read_pairs(tmp_path)
    write_shards(tmp_path)
    assert len(read_pairs(tmp_path, max_damaged=0.5)) == 12


def test_an_empty_shard_is_no_damage(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_tar(tmp_path / "00003.tar", [])
    assert not read_pairs(tmp_path).damaged


def test_damaged_metadata(tmp_path: Path) -> None:
    members = sample("1", NAMES[0])
    members[1] = ("1.json", b'{"caption": ')
    write_tar(tmp_path / "a.tar", [*members, ("2.json", b"[1]"), *sample("3", NAMES[1])[:1]])
    pairs = read_pairs(tmp_path, max_damaged=0.9)
    assert pairs.table["captions"].to_pylist() == [[f"a {NAMES[0]}"], []]
    assert [d.key for d in pairs.damaged] == ["a/1", "a/2"]
    assert "the sample is kept without it" in pairs.damaged[0].reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a\0b\x07c", "a b c"),
        ("שלום עולם".encode(), "שלום עולם"),
        ("👩‍🚀 on the moon".encode(), "👩‍🚀 on the moon"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        ("Café".encode("utf-16"), "Café"),
        (b"Caf\xe9", "Café"),
        (b"Caf\xe9, \xc3\xa9, \xc3\xa9", "the caption is not UTF-8"),
        (b"\xff\xd8\0\1", "the caption is not UTF-8"),
    ],
)
def test_captions(tmp_path: Path, text: bytes, expected: str) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", b"x"), ("1.txt", text), ("2.png", b"x"), ("2.txt", b"good")])
    pairs = read_pairs(tmp_path, max_damaged=0.9)
    if pairs.damaged:
        assert [(d.key, d.reason) for d in pairs.damaged] == [("a/1", expected)]
        assert pairs.table["key"].to_pylist() == ["a/2"]
    else:
        assert pairs.table["captions"][0].as_py() == [expected]


def test_lone_surrogates_and_odd_values_in_metadata(tmp_path: Path) -> None:
    rows = [
        {"caption": "bad \ud800"},
        {"caption": 7},
        {"caption": "fine", "x": True, "url": "\ud800", "split": "\ud800"},
        {"caption": "fine", "x": {"deep": [1]}, "url": None},
    ]
    members = [m for i, row in enumerate(rows) for m in ((f"{i}.png", b"x"), (f"{i}.json", json.dumps(row).encode()))]
    write_tar(tmp_path / "a.tar", members)
    pairs = read_pairs(tmp_path, max_damaged=0.9, keep=("x",))
    assert [d.reason for d in pairs.damaged] == ["the caption is not UTF-8", "the caption is 7, expected a string"]
    assert pairs.table["x"].to_pylist() == ["true", '{"deep": [1]}']
    assert pairs.table["url"].to_pylist() == ["?", None]


def test_columns_grow_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is a number in one part and a text in another; the same pairs however many parts there are."""
    members = [m for i, name in enumerate(NAMES) for m in sample(str(i), name, score=i if i < 6 else f"{i} points")]
    write_tar(tmp_path / "a.tar", members)
    whole = read_pairs(tmp_path, keep=("score",))
    monkeypatch.setattr("litune.pairs.pairs.ROWS", 5)
    parts = read_pairs(tmp_path, keep=("score",))
    assert parts.table.equals(whole.table)
    assert parts.fingerprint() == whole.fingerprint()
    assert whole.table["score"].to_pylist()[4:7] == ["4", "5", "6 points"]


def test_two_pictures_of_a_sample(tmp_path: Path) -> None:
    """The first is taken, the others are counted."""
    members = []
    for name in NAMES:
        members += [(f"{name}.jpg", picture(name, "JPEG")), (f"{name}.png", picture("red-bar")), (f"{name}.txt", b"x")]
        members += [(f"{name}.seg.png", picture("red-bar"))]
    shard = write_tar(tmp_path / "0.tar", members)
    first = read_pairs(shard)
    left_out = "12 second pictures (.png) left out, 12 second pictures (.seg.png) left out"
    assert first.source == f"1 webdataset shard in {tmp_path}, {left_out}"
    assert [read_bytes(path) for path in first.table["path"].to_pylist()] == [picture(n, "JPEG") for n in NAMES]
    other = read_pairs(shard, image_column="png")
    assert other.source == f"1 webdataset shard in {tmp_path}"
    assert {read_bytes(path) for path in other.table["path"].to_pylist()} == {picture("red-bar")}


@pytest.mark.parametrize(
    ("members", "samples", "note"),
    [
        (["2020.01.0.png", "2020.01.0.txt", "2020.01.1.png", "2020.01.1.txt"], {"2020.01.0": 1, "2020.01.1": 1}, ""),
        (["2020.01.0.png", "2020.01.1.png", "2020.01.1.txt"], {"2020.01.0": 0, "2020.01.1": 1}, ""),
        (["2020.01.0.png", "2020.01.1.png"], {"2020.01.0": 0, "2020.01.1": 0}, ""),
        (["0.left.png", "0.right.png", "0.txt"], {"0": 1}, ", 1 second pictures (.right.png) left out"),
        (["0.image.png", "0.caption.txt"], {"0": 1}, ""),
        (["0.png", "0.en.txt", "0.de.txt", "0.meta.json"], {"0": 2}, ""),
        (["0.png", "0.txt", "0.alt.txt"], {"0": 1}, ", 1 further texts (.alt.txt) left out"),
        (["0.png", "0.txt", "0.1.png", "0.1.txt"], {"0": 1, "0.1": 1}, ""),
    ],
)
def test_names_with_dots(tmp_path: Path, members: list[str], samples: dict[str, int], note: str) -> None:
    contents = {"png": picture(NAMES[0]), "txt": b"a dog", "json": b"{}"}
    shard = write_tar(tmp_path / "0.tar", [(name, contents[name.rpartition(".")[2]]) for name in members])
    pairs = read_pairs(shard)
    read = zip(pairs.table["key"].to_pylist(), map(len, pairs.table["captions"].to_pylist()), strict=True)
    assert {key.removeprefix("0/"): count for key, count in read} == samples
    assert note in pairs.source
    assert ("left out" in pairs.source) == bool(note)
