"""Mutated files of every kind: what can't be used is named, nothing else happens."""

from __future__ import annotations

import json
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, hub_table, picture, sample, write_tar

from litune.errors import DataError
from litune.image.pictures import decode, open_rgb
from litune.pairs.pairs import Pairs, read_pairs
from litune.pairs.reference import read_each

TRIES = 100


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A file that is read for ever is a failure."""

    def late(_: int, __: FrameType | None) -> None:
        raise TimeoutError("reading does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def mutations(data: bytes, seed: str, tries: int = TRIES) -> Iterator[bytes]:
    """The data with bytes changed, cut out, repeated or put elsewhere, or its end cut off."""
    random = np.random.default_rng(zlib.crc32(seed.encode()))
    for _ in range(tries):
        found = bytearray(data)
        for _ in range(int(random.integers(1, 5))):
            at, other = sorted(int(x) for x in random.integers(0, max(len(found), 1), 2))
            kind = random.integers(0, 6)
            if kind == 0:
                found = found[:other]
            elif kind == 1:
                del found[at : at + int(random.integers(1, 600))]
            elif kind == 2:
                found[at:at] = found[at:other][:2000]
            elif kind == 3:
                found[at:at] = random.bytes(int(random.integers(1, 20)))
            elif found:
                for place in random.integers(0, len(found), 1 if kind == 4 else 20):
                    found[place] = int(random.integers(0, 256))
        yield bytes(found)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA"])
def test_pictures(kind: str) -> None:
    """A mutated picture is one that can be decoded, or one line that says why not."""
    whole = picture(NAMES[0], kind)
    assert open_rgb(whole).size == (48, 48)
    good = 0
    for data in mutations(whole, kind, 60):
        try:
            found = open_rgb(data)
        except DataError as why:
            check_message(why)
        else:
            good += 1
            assert found.mode == "RGB"
    assert good < 60


def jsonl() -> bytes:
    return b"\n".join(json.dumps({"image": f"{name}.png", "caption": f"a {name}"}).encode() for name in NAMES)


def coco() -> bytes:
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(NAMES)]
    captions = [{"image_id": i, "caption": f"a {name}"} for i, name in enumerate(NAMES)]
    return json.dumps({"images": images, "annotations": captions}).encode()


def csv() -> bytes:
    return b"image,caption\n" + b"\n".join(f'{name}.png,"a ""{name}"", really"'.encode() for name in NAMES)


def tar() -> bytes:
    file = write_tar(Path("whole.tar"), [m for i, name in enumerate(NAMES[:4]) for m in sample(f"{i:09}", name)])
    data = file.read_bytes()
    file.unlink()
    return data


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(hub_table(NAMES[:4]), sink, row_group_size=2)
    return bytes(sink.getvalue())


def arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = hub_table(NAMES[:4])
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("set/00000.tar", tar),
        ("set/a.parquet", parquet),
        ("set/data.arrow", arrow),
        ("images/captions.csv", csv),
        ("images/captions.jsonl", jsonl),
        ("images/captions_x.json", coco),
    ],
)
def test_sources(name: str, make: Callable[[], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutated source is an error of one line, or pairs whose pictures can each be read or not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for one in NAMES:
        (tmp_path / "images" / f"{one}.png").write_bytes(picture(one))
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".arrow":
        (file.parent / "state.json").write_text("{}")
    good = bad = 0
    whole = make()
    file.write_bytes(whole)
    assert not read_pairs(file.parent).damaged
    for data in mutations(whole, name):
        file.unlink()  # one that is mapped into memory must not change under those who read it
        file.write_bytes(data)
        try:
            pairs = read_pairs(file.parent, max_damaged=1.0)
        except DataError as why:
            check_message(why)
            bad += 1
        else:
            good += 1
            check(pairs)
    assert good > 0
    assert good + bad == TRIES


def check_message(why: DataError) -> None:
    assert str(why).strip()
    assert "\n" not in str(why)


def check(pairs: Pairs) -> None:
    """Everything that embed does with pairs, but for the tower."""
    pairs.table.validate(full=True)
    assert pairs.fingerprint()
    keys, paths = (pairs.table[name].to_pylist() for name in ("key", "path"))
    for damage in pairs.damaged:
        json.dumps([damage.key, damage.reason], ensure_ascii=False).encode()
        assert damage.key
        assert damage.reason
    for i, (key, path, data) in enumerate(zip(keys, paths, read_each(paths), strict=True)):
        found = decode(i, key, path, data, np.asarray)
        assert (found.pixels is None) == (found.damage is not None)
