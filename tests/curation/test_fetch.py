"""`litune data fetch` from a server on this machine that does everything a server can do wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.pairs.packed import picture

from litune.claims import claim
from litune.curation import fetch as fetching
from litune.curation import fetch_worker
from litune.curation.fetch import fetch_data, reason_of
from litune.errors import DataError, LituneError, MissingExtraError, OutputBusyError, OutputExistsError
from litune.pairs.pairs import read_pairs

PYTHON = os.environ.get("LITUNE_FETCH_PYTHON", sys.executable)
"""A Python that has img2dataset: this one, or another environment's."""


@functools.cache
def has_img2dataset() -> bool:
    return "True" in subprocess.run([PYTHON, "-c", fetching.LOOK], capture_output=True, text=True, check=False).stdout


class Handler(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 (shared on purpose)

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        Handler.asked.append(self.path)
        kind, good = self.path.split("/")[1], picture("red-bar", "JPEG")
        answers = {
            "good": lambda: self.answer(200, good),
            "gone": lambda: self.answer(404),
            "broken": lambda: self.answer(500),
            "silent": lambda: time.sleep(6),
            "slow": self.drip,
            "short": lambda: self.answer(200, good[:200], length=len(good)),
            "html": lambda: self.answer(200, b"<html>", Content_Type="image/jpeg"),
            "huge": self.flood,
            "circle": lambda: self.answer(302, Location=self.path),
            "file": lambda: self.answer(302, Location="file:///etc/passwd"),
            "ftp": lambda: self.answer(302, Location="ftp://127.0.0.1/x"),
            "mine": lambda: self.answer(200, good, X_Robots_Tag="noai"),
        }
        with contextlib.suppress(OSError):  # the other side hangs up
            answers[kind]()

    def drip(self) -> None:
        self.answer(200, length=1000)
        for _ in range(60):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def flood(self) -> None:
        self.answer(200, length=1 << 40)
        for _ in range(2000):
            self.wfile.write(bytes(1 << 16))


@pytest.fixture
def server() -> Iterator[str]:
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


REASONS = {
    "gone": "HTTP 404 Not Found",
    "broken": "HTTP 500 Internal Server Error",
    "silent": "no answer in time",
    "slow": "too slow",
    "short": "ended too early",
    "html": "not an image",
    "huge": "too large",
    "circle": "redirected in a circle",
    "file": "redirected to what is not http",
    "ftp": "redirected to what is not http",
    "mine": "not to be used, the server says (X-Robots-Tag)",
}


@pytest.mark.skipif("not has_img2dataset()", reason="needs img2dataset")
def test_everything_that_can_go_wrong(server: str, tmp_path: Path) -> None:
    urls = [f"{server}/good/{i}" for i in range(6)] + [f"{server}/{kind}/0" for kind in REASONS]
    urls += ["file:///etc/passwd", "", "http://127.0.0.1:1/refused"]
    columns = {"url": urls, "caption": [f"picture {i}" for i in range(len(urls))], "score": list(range(len(urls)))}
    pa.parquet.write_table(pa.table(columns), tmp_path / "urls.parquet")
    settings: dict[str, Any] = {
        "urls": tmp_path / "urls.parquet", "out": tmp_path / "out", "python": Path(PYTHON), "keep": ("score",),
        "timeout": 4.0, "seconds": 4.0, "most_bytes": 1_000_000, "retries": 0, "processes": 1,
    }  # fmt: skip
    report = fetch_data(**settings)
    expected: dict[str, int] = {"no http address": 2, "connection refused": 1}
    for reason in REASONS.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert report["reasons"] == expected
    assert (report["urls"], report["fetched"], report["lost"]) == (20, 6, 14)
    about = tmp_path / "out" / "fetch"
    assert json.loads((about / "link-rot.json").read_text()) == report
    assert "6 of 20 images fetched, 70.0% lost" in (about / "link-rot.txt").read_text()

    pairs = read_pairs(tmp_path / "out", keep=["score"])
    assert sorted(c[0] for c in pairs.table["captions"].to_pylist()) == [f"picture {i}" for i in range(6)]
    assert sorted(pairs.table["score"].to_pylist()) == [0, 1, 2, 3, 4, 5]
    assert not pairs.damaged


STUB = """
import json, os, tarfile
from pathlib import Path
import pyarrow.parquet as pq
def download(url_list, output_folder, number_sample_per_shard, **settings):
    rows, out = pq.read_table(url_list).to_pylist(), Path(output_folder)
    for i in range(0, len(rows), number_sample_per_shard):
        shard = f"{i // number_sample_per_shard:05}"
        if (out / f"{shard}_stats.json").exists():
            continue
        with open("shards.log", "a") as log:
            print(shard, file=log)
        count = len(rows[i : i + number_sample_per_shard])
        if shard == "00001" and not (out / "00001.tar").exists():
            (out / "00001.tar").write_bytes(b"half")
            raise SystemExit("the power is gone")
        tarfile.open(out / f"{shard}.tar", "w").close()
        counts = {"success": 1, "HTTP Error 404: Not Found": count - 1}
        (out / f"{shard}_stats.json").write_text(json.dumps({"count": count, "successes": 1, "status_dict": counts}))
"""


def test_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for img2dataset that keeps to its files and ends in its second shard, once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(fetching, "POLL_SECONDS", 0.02)
    (tmp_path / "img2dataset.py").write_text(STUB)
    (tmp_path / "urls.txt").write_text("".join(f"http://x/{i}\n" for i in range(8)) + "ftp://x\n")
    settings: dict[str, Any] = {"urls": "urls.txt", "out": "out", "shard_size": 3}
    with pytest.raises(DataError, match=r"ended with 3 of 8 URLs done .*the same command goes on"):
        fetch_data(**settings)
    assert "the power is gone" in (tmp_path / "out" / "fetch" / "img2dataset.log").read_text()
    report = fetch_data(**settings)
    assert report["reasons"] == {"HTTP 404 Not Found": 5, "no http address": 1}
    assert (report["urls"], report["fetched"]) == (9, 3)
    assert (tmp_path / "shards.log").read_text().split() == ["00000", "00001", "00001", "00002"]
    assert fetch_data(**settings) == report
    assert len((tmp_path / "shards.log").read_text().split()) == 4, "nothing is fetched twice"
    with pytest.raises(OutputExistsError, match="was begun with --image-size 384, not 64"):
        fetch_data(**settings, image_size=64)
    (tmp_path / "urls.txt").write_text("http://x/1\n")
    with pytest.raises(OutputExistsError, match="was begun with another list"):
        fetch_data(**settings)
    with pytest.raises(DataError, match="ended with 0 of 1"):
        (tmp_path / "img2dataset.py").write_text("def download(**_): raise SystemExit")
        fetch_data(**settings, overwrite=True)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("address\nx\n", {}, "no column of URLs"),
        ("url\nfile:///etc/passwd\n\n", {}, "has no http address"),
        ("url,caption\nhttp://x/1,a\n", {"keep": ("licence",)}, "no column 'licence'"),
        ("url,caption,width\nhttp://x/1,a,3\n", {"keep": ("width",)}, "img2dataset writes a width of its own"),
        ("", {}, "is empty"),
    ],
)
def test_lists(
    text: str, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_find_img2dataset", lambda _: sys.executable)
    (tmp_path / "urls.csv").write_text(text)
    with pytest.raises(LituneError, match=message):
        fetch_data(urls=tmp_path / "urls.csv", out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "settings"),
    [
        ("URL\tTEXT", {}),
        ("image_url\ttitle", {}),
        ("Address\tWords", {"url_column": "address", "caption_column": "words"}),
    ],
)
def test_names_of_columns_in_any_case(header: str, settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "laion.tsv").write_bytes(f"{header}\tSimilarity\nhttp://x/1\tein Café\t0.3\n".encode("utf-16"))
    config = fetching.FetchConfig(tmp_path / "laion.tsv", tmp_path / "out", keep=("similarity",), **settings)
    rows = list(fetching._rows(config, fetching.Counter()))
    assert rows == [{"url": "http://x/1", "caption": "ein Café", "similarity": "0.3"}]


def test_without_img2dataset(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho False\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(DataError, match="has no img2dataset: run"):
        fetch_data(urls="http://x", out=tmp_path / "out", python=tmp_path / "python")
    with pytest.raises(DataError, match="can't be started"):
        fetch_data(urls="http://x", out=tmp_path / "out", python=tmp_path / "nothing")


def test_no_two_write_one_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_find_img2dataset", lambda python: PYTHON)
    with claim(tmp_path / "out"), pytest.raises(OutputBusyError, match="out is being written by"):
        fetch_data(urls=tmp_path / "urls.txt", out=tmp_path / "out")


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LOOK", "print(False)")
    with pytest.raises(MissingExtraError, match=r"pip install 'litune\[fetch\]'"):
        fetch_data(urls="http://x", out=tmp_path / "out")


def test_a_run_that_ended_while_it_wrote_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_find_img2dataset", lambda _: sys.executable)
    monkeypatch.setattr(fetching, "_download", lambda *_: None)
    (tmp_path / "urls.txt").write_text("http://x/1\n")
    about = tmp_path / "out" / "fetch"
    about.mkdir(parents=True)
    (about / ".urls.parquet.1.tmp").write_text("half a list")
    assert fetch_data(urls=tmp_path / "urls.txt", out=tmp_path / "out")["urls"] == 0
    assert pyarrow.parquet.read_table(about / "urls.parquet")["url"].to_pylist() == ["http://x/1"]


def test_a_file_that_is_not_ours_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_find_img2dataset", lambda _: sys.executable)
    (tmp_path / "urls.txt").write_text("http://x/1\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(OutputExistsError):
        fetch_data(urls=tmp_path / "urls.txt", out=tmp_path / "out", overwrite=True)


class Answer(io.BytesIO):
    """What urllib gives, as far as it is used: `length` is what is still to come."""

    headers: dict[str, str] = {}  # noqa: RUF012
    length = 0


def test_limits() -> None:
    with fetch_worker.Limited(Answer(b"x" * 100), most_bytes=100, seconds=9) as answer:
        assert answer.read() == b"x" * 100
    for settings, length, message in (
        ({"most_bytes": 99, "seconds": 9}, 0, "larger than 99"),
        ({"most_bytes": 100, "seconds": -1}, 0, "too slow"),
        ({"most_bytes": 100, "seconds": 9}, 5, "ended too early"),
    ):
        body = Answer(b"x" * 100)
        body.length = length
        with pytest.raises(ValueError, match=message):
            fetch_worker.Limited(body, **settings).read()


def test_reasons() -> None:
    assert reason_of("HTTP Error 404: Not Found") == "HTTP 404 Not Found"
    assert reason_of("<urlopen error [Errno -2] Name or service not known>") == "no such host"
    assert reason_of("something\nelse") == "something"
