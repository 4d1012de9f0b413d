"""Sources that are not on this machine: in fsspec's memory, and on a web server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import NAMES, hub_table, picture, write_shards

from litune.errors import DataError, MissingExtraError
from litune.pairs.pairs import read_pairs
from litune.pairs.reference import read_bytes


def write(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def write_coco(folder: Path) -> None:
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(NAMES)]
    captions = [{"image_id": i, "caption": f"a {name}"} for i, name in enumerate(NAMES)]
    for split, part in (("train2017", slice(0, 8)), ("val2017", slice(8, 12))):
        write(folder, {f"{split}/{name}.png": picture(name) for name in NAMES[part]})
        facts = {"images": images[part], "annotations": captions[part]}
        write(folder, {f"annotations/captions_{split}.json": json.dumps(facts)})


def write_karpathy(folder: Path) -> None:
    rows = [
        {"filename": f"{n}.png", "filepath": "val2014", "split": "test", "sentences": [{"raw": f"a {n}"}]}
        for n in NAMES
    ]
    write(folder, {f"images/val2014/{name}.png": picture(name) for name in NAMES})
    write(folder, {"dataset_coco.json": json.dumps({"images": rows})})


def write_table(folder: Path, name: str = "captions.csv") -> None:
    write(folder, {f"images/{name}.png": picture(name) for name in NAMES})
    head, rows = ("image,caption\n", "{0}.png,a {0}\n") if name.endswith(".csv") else ("", "{0}.png#0\ta {0}\n")
    write(folder, {name: head + "".join(rows.format(n) for n in NAMES)})


def write_files(folder: Path) -> None:
    write(folder, {f"{name}.png": picture(name) for name in NAMES})
    write(folder, {f"{name}.txt": f"a {name}" for name in NAMES})


def write_parts(folder: Path) -> None:
    for part, names in (("00000", NAMES[:6]), ("00001", NAMES[6:])):
        write_files(folder / part)
        for name in set(NAMES) - set(names):
            (folder / part / f"{name}.png").unlink()
        write(folder, {f"{part}_stats.json": "{}"})
        pa.parquet.write_table(pa.table({"url": names}), folder / f"{part}.parquet")


def write_classes(folder: Path) -> None:
    write(folder, {f"a_{name}/{i}.png": picture(name) for name in NAMES for i in range(2)})


def write_parquet(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    pa.parquet.write_table(hub_table(NAMES), folder / "data" / "test-00000-of-00001.parquet")


def write_rows(folder: Path) -> None:
    """Rows in a JSON list, named as COCO's captions are; other tables and hidden files beside them mean nothing."""
    write(folder, {f"{name}.png": picture(name) for name in NAMES} | {".cache/x.png": picture(NAMES[0])})
    rows = [{"image": f"{name}.png", "caption": f"a {name}"} for name in NAMES]
    write(folder, {"captions_train.json": json.dumps(rows), "notes/prices.csv": "thing,price\nx,1\n"})


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "shards": write_shards, "parquet": write_parquet, "coco": write_coco, "karpathy": write_karpathy,
    "csv": write_table, "token": partial(write_table, name="results.token.txt"), "files": write_files,
    "parts": write_parts, "classes": write_classes, "rows": write_rows,
}  # fmt: skip


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Copies a folder into fsspec's memory."""
    system = fsspec.filesystem("memory")

    def copy(folder: Path) -> str:
        system.put(str(folder), f"/elsewhere/{folder.name}", recursive=True)
        return f"memory://elsewhere/{folder.name}"

    yield copy
    system.rm("/elsewhere", recursive=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, tmp_path: Path, memory: Callable[[Path], str]) -> None:
    """The same pairs as on this machine, and the same bytes behind each reference."""
    LAYOUTS[layout](tmp_path / layout)
    there = read_pairs(memory(tmp_path / layout))
    here = read_pairs(tmp_path / layout)
    assert len(there) == (24 if layout == "classes" else 12)
    assert not there.damaged
    names = [name for name in here.table.column_names if name != "path"]
    assert there.table.select(names).to_pydict() == here.table.select(names).to_pydict()
    for one, other in zip(there.table["path"].to_pylist(), here.table["path"].to_pylist(), strict=True):
        assert one.startswith("memory://")
        assert read_bytes(one) == read_bytes(other)
    assert there.source == here.source.replace(f"{tmp_path}/", "memory://elsewhere/")


def test_what_is_not_there(tmp_path: Path, memory: Callable[[Path], str]) -> None:
    write(tmp_path / "store", {"img_emb/img_emb_0000.npy": "", "metadata/metadata_0000.parquet": ""})
    with pytest.raises(DataError, match="is a feature store, which is read on this machine alone"):
        read_pairs(memory(tmp_path / "store"))
    write_table(tmp_path / "csv")
    for file in (tmp_path / "csv" / "images").iterdir():
        file.unlink()
    write(tmp_path / "csv", {"images/other.txt": "x"})
    where = memory(tmp_path / "csv")
    with pytest.raises(DataError, match=r"none of the images that .*name their folder with --images"):
        read_pairs(f"{where}/captions.csv")
    assert read_pairs(f"{where}/captions.csv", images="s3://photos/2020").table["path"][0].as_py() == (
        f"s3://photos/2020/{NAMES[0]}.png"
    )
    write(tmp_path / "arrow", {"state.json": "{}", "data-0.arrow": "x"})
    with pytest.raises(DataError, match="has Arrow data, which is read on this machine alone: copy it"):
        read_pairs(memory(tmp_path / "arrow"))
    with pytest.raises(DataError, match="0.arrow has Arrow data, which is read on this machine alone"):
        read_pairs("memory://elsewhere/arrow/data-0.arrow")
    write(tmp_path / "notes", {"a/b/c.md": "x"})
    with pytest.raises(DataError, match="has no shards, no table of captions and no images in it"):
        read_pairs(memory(tmp_path / "notes"))


class Ranges(SimpleHTTPRequestHandler):
    """Python's own file server, which does not know parts of files, with them."""

    parts = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not Ranges.parts:
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine, of the test's folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("layout", "address"),
    [
        ("shards", "{00000..00002}.tar"),
        ("parquet", "data/test-00000-of-00001.parquet"),
        ("coco", ""),
        ("csv", "captions.csv"),
        ("files", ""),
    ],
)
def test_a_web_server(layout: str, address: str, tmp_path: Path, site: str) -> None:
    pytest.importorskip("aiohttp", reason="needs the extra http")
    LAYOUTS[layout](tmp_path / layout)
    there = read_pairs(f"{site}/{layout}/{address}")
    here = read_pairs(tmp_path / layout)
    assert there.captions == here.captions == 12 * (1 + (layout == "parquet"))
    for name in ("key", "captions"):
        assert there.table[name].to_pylist() == here.table[name].to_pylist()
    assert read_bytes(there.table["path"][5].as_py()) == read_bytes(here.table["path"][5].as_py())


def test_a_web_server_that_lists_nothing(tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is read by its address; its images are looked for where none needs a list of files."""
    pytest.importorskip("aiohttp", reason="needs the extra http")
    monkeypatch.setattr(Ranges, "list_directory", lambda self, path: self.send_error(403))
    write_table(tmp_path / "csv")
    (tmp_path / "csv" / "images").rename(tmp_path / "csv" / "captions")
    pairs = read_pairs(f"{site}/csv/captions.csv")
    assert pairs.table["path"][3].as_py() == f"{site}/csv/captions/{NAMES[3]}.png"
    with pytest.raises(DataError, match="csv/"):
        read_pairs(f"{site}/csv/")


def test_a_web_server_that_gives_no_parts(tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="needs the extra http")
    monkeypatch.setattr(Ranges, "parts", False)
    write_shards(tmp_path / "shards")
    pairs = read_pairs(f"{site}/shards/00001.tar")
    with pytest.raises(OSError, match=r"00001.tar: the server gives whole files, no parts of them: copy"):
        read_bytes(pairs.table["path"][1].as_py())


def test_no_web_server(site: str) -> None:
    pytest.importorskip("aiohttp", reason="needs the extra http")
    with pytest.raises(DataError, match="nothing was found at http.*/nothing: check the address"):
        read_pairs(f"{site}/nothing/")
    with pytest.raises(DataError, match="nothing was found at http.*/nothing.tar: check the address"):
        read_pairs(f"{site}/nothing.tar")
    with pytest.raises(DataError, match=r"nothing/00000.tar: the shard does not exist"):
        read_pairs(f"{site}/nothing/{{00000..00001}}.tar")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(address: str) -> None:
        raise ImportError("no aiohttp")

    monkeypatch.setattr("litune.pairs.address.url_to_fs", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'litune\[http\]'"):
        read_pairs("http://127.0.0.1:1/a.tar")
