"""How many requests a second `litune serve` answers, against the bare model; and what bad requests do to it.

Starts a server of its own on this machine's loopback address. By default it serves a run that is made here (MiniLM on
random features: what a request costs doesn't depend on their values); --run and --images take yours. Prints a table,
then one JSON object on its last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_run import machine
from bench_store import read_captions, write_store

import litune

WARM, ROUNDS = 200, 5


def make_run(folder: Path, text_tower: str, dim: int) -> tuple[Path, Path]:
    """A run and its store, tuned for a step."""
    write_store(folder / "store", [f"picture number {i}" for i in range(512)], dim)
    litune.tune(
        folder / "store", text_tower=text_tower, out=folder / "run", duration="2steps", batch_size=64, evaluations=0,
        device="cpu",
    )  # fmt: skip
    return folder / "run", folder / "store"


class Server:
    """`litune serve` in a process of its own."""

    def __init__(self, run: Path, images: Path, log: Path, *options: str) -> None:
        command = [sys.executable, "-m", "litune", "serve", str(run), "--images", str(images), "--port", "0", *options]
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=file)
        due = time.monotonic() + 180
        while b"Ctrl-C ends it" not in (said := log.read_bytes()):
            if self.process.poll() is not None or time.monotonic() > due:
                self.process.kill()
                raise SystemExit(f"the server did not start: {said.decode()}")
            time.sleep(0.1)
        self.port = int(said.decode().rpartition("127.0.0.1:")[2].partition("/")[0])

    def resident_mb(self) -> float:
        """Its memory that no file backs, in 10⁶ bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6

    def stop(self) -> int:
        """End it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(run: Path, images: Path, log: Path, *options: str) -> Iterator[Server]:
    server = Server(run, images, log, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


# Load


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


async def client(port: int, requests: Iterator[bytes], taken: list[float], statuses: Counter[str]) -> None:
    """One connection that asks, waits, asks again. Answers are counted, not parsed: the client is not measured."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    for data in requests:
        began = time.perf_counter()
        try:
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            await reader.readexactly(length)
        except (ConnectionError, asyncio.IncompleteReadError):  # the server ended a connection that was idle too long
            statuses["connection closed"] += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
            continue
        taken.append(time.perf_counter() - began)
        statuses[head.split(b" ", 2)[1].decode()] += 1
    writer.close()


async def load(port: int, requests: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """All requests over so many connections, for at most so long."""
    due = time.monotonic() + seconds

    def bounded() -> Iterator[bytes]:
        for data in requests:
            if time.monotonic() > due:
                return
            yield data

    taken: list[float] = []
    statuses: Counter[str] = Counter()
    shared, began = bounded(), time.perf_counter()
    await asyncio.gather(*(client(port, shared, taken, statuses) for _ in range(clients)))
    whole = time.perf_counter() - began
    return {
        "requests": len(taken),
        "seconds": round(whole, 2),
        "requests_per_second": round(len(taken) / whole, 1),
        "p50_ms": round(1000 * float(np.median(taken)), 2),
        "p99_ms": round(1000 * float(np.quantile(taken, 0.99)), 2),
        "statuses": dict(sorted(statuses.items())),
    }


def bare_rate(model: litune.LiT, texts: list[str], batch: int) -> float:
    """Texts a second of the model alone, in batches as large as the server's."""
    model.encode_text(texts[:batch])
    began = time.perf_counter()
    for start in range(0, len(texts), batch):
        model.encode_text(texts[start : start + batch])
    return len(texts) / (time.perf_counter() - began)


# Bad requests


def bad_requests(count: int, seed: int = 0) -> Iterator[tuple[str, bytes, bool]]:
    """Named bad requests, as the bytes that are sent, and whether the client then goes away."""
    dice = random.Random(seed)
    kinds = sorted(BAD)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        yield kind, BAD[kind](dice), kind.startswith("gone")


def _json(dice: random.Random, body: Any, path: str | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    where = path or dice.choice(["/v1/encode/text", "/v1/match", "/v1/classify", "/v1/search"])
    head = f"POST {where} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _form(data: bytes, declared: int = 0) -> bytes:
    whole = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n' + data + b"\r\n--b--\r\n"
    head = "POST /v1/encode/image HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {declared or len(whole)}\r\n\r\n"
    return head.encode() + whole


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _wrong_type(dice: random.Random) -> bytes:
    value = dice.choice([None, True, 3, -1.5, "x", [], {}, [[]], {"row": "1"}, [{"row": None}], [None]])
    field = dice.choice(["texts", "images", "classes", "text", "image", "top", "where", "templates"])
    return _json(dice, {"text": 1, field: value})


def _get(target: str, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in ("Host: 127.0.0.1", "Connection: close", *headers))
    return f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode()


PATHS = ["/v1/images/../../etc/passwd", "/%00", "/page/%2e%2e/app.py", "/v1/images/-1/picture"]
BAD = {
    "wrong types": _wrong_type,
    "no JSON": lambda dice: _json(dice, dice.randbytes(dice.randrange(1, 200))),
    "cut JSON": lambda dice: _json(dice, b'{"texts":["a red box"]}'[: dice.randrange(1, 22)]),
    "deep JSON": lambda dice: _json(dice, b"[" * dice.randrange(1000, 200_000)),
    "huge numbers": lambda dice: _json(dice, b'{"text":"a","top":' + b"9" * dice.randrange(20, 9000) + b"}"),
    "not a number": lambda dice: _json(dice, b'{"text":"a","text_weight":NaN}', "/v1/search"),
    "huge text": lambda dice: _json(dice, {"texts": ["x" * dice.randrange(20_000, 3_000_000)]}, "/v1/encode/text"),
    "many texts": lambda dice: _json(dice, {"texts": ["x"] * dice.randrange(600, 100_000)}, "/v1/encode/text"),
    "NUL": lambda dice: _json(dice, {"text": "\x00" * dice.randrange(1, 50), "where": ["key=\x00"]}, "/v1/search"),
    "surrogates": lambda dice: _json(dice, b'{"texts":["\\ud83d"]}', "/v1/encode/text"),
    "bad filters": lambda dice: _json(dice, {"text": "a", "where": [dice.choice(["x", "=", "key<>1", "' or 1=1"])]}),
    "far rows": lambda dice: _json(dice, {"images": [{"row": dice.randrange(10**6, 10**7)}], "texts": ["a"]}),
    "bad features": lambda dice: _json(dice, {"images": [{"features": [0.0] * dice.randrange(3000)}], "texts": ["a"]}),
    "wrong type of body": lambda dice: _json(dice, b"a=1").replace(b"application/json", b"text/plain"),
    "too large": lambda dice: _json(dice, b"", "/v1/search").replace(b"th: 0", b"th: 99999999999"),
    "image bomb": lambda dice: _form(_png(dice.randrange(7100, 60000), dice.randrange(7100, 60000), bytes(10**6))),
    "large cut picture": lambda dice: _form(_png(6000, dice.randrange(1000, 6000), bytes(10**6))),
    "damaged picture": lambda dice: _form(_png(64, 64, dice.randbytes(dice.randrange(100)))),
    "no picture": lambda dice: _form(dice.randbytes(dice.randrange(5000))),
    "cut form": lambda dice: _form(b"")[: -dice.randrange(2, 20)].replace(b"Content-Length: 90", b"Content-Length: 80"),
    "gone in a form": lambda dice: _form(dice.randbytes(3000), declared=9999),
    "gone in JSON": lambda dice: _json(dice, b"{", "/v1/search").replace(b"th: 1", b"th: 99"),
    "gone in the head": lambda dice: _get("/v1/model")[: dice.randrange(1, 40)],
    "paths": lambda dice: _get(dice.choice(PATHS)),
    "queries": lambda dice: _get(f"/v1/images?offset={dice.choice(['-1', 'x', '9' * 400, '%00', '1e3'])}"),
    "no HTTP": lambda dice: dice.randbytes(dice.randrange(4, 300)) + b"\r\n\r\n",
    "long head": lambda dice: _get("/", "X: " + "y" * dice.randrange(70_000, 200_000)),
    "methods": lambda dice: _get("/v1/model").replace(b"GET", dice.choice([b"PUT", b"DELETE", b"BREW", b"TRACE"]), 1),
    "hosts": lambda dice: _get("/v1/model").replace(b"127.0.0.1", dice.choice([b"evil.example", b"", b"\xff"])),
    "slow": lambda dice: _json(dice, b"{", "/v1/search").replace(b"th: 1", b"th: 50"),
}  # fmt: skip


async def send(port: int, kind: str, data: bytes, gone: bool) -> str:
    """The status that one bad request gets, or what happened instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if gone:
            await writer.drain()
            return "gone"
        answer = await asyncio.wait_for(reader.read(1 << 20), 30)
        return answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"
    except ConnectionError:
        return "closed"
    finally:
        writer.close()


async def send_all(port: int, count: int, seed: int, at_once: int = 16) -> dict[str, Counter[str]]:
    """Statuses by kind of bad request."""
    found: dict[str, Counter[str]] = {}
    requests = bad_requests(count, seed)

    async def one() -> None:
        for kind, data, gone in requests:
            status = await send(port, kind, data, gone)
            found.setdefault(kind, Counter())[status] += 1

    await asyncio.gather(*(one() for _ in range(at_once)))
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if options.run is None:
        run, images = make_run(folder, options.text_tower, options.dim)
    else:
        run, images = options.run, options.images
    given = [] if options.captions is None else read_captions(options.captions, [], ["en"])
    things, places = ("dog", "cat", "tree", "red house"), ("park", "snow", "sea")
    words = given or [f"a photo of a {thing} in the {place}" for thing in things for place in places]
    texts = [f"{words[i % len(words)]} {i}" for i in range(options.requests + WARM)]
    found: dict[str, Any] = {}
    model = litune.load(run, device="cpu")
    torch.set_num_threads(options.threads)
    with serving(run, images, folder / "serve.log", "--body-seconds", "5", "--threads", str(options.threads)) as server:
        encode = [request("/v1/encode/text", {"texts": [text]}) for text in texts]
        search = [request("/v1/search", {"text": f"{text}?", "top": 10}) for text in texts]
        for requests in (encode, search):
            asyncio.run(load(server.port, requests[:WARM], options.clients, options.seconds))
        # By turns, so that whatever else the machine does hits both alike.
        rounds, bare = [], []
        size = (len(texts) - WARM) // ROUNDS
        for start in range(WARM, len(texts) - size + 1, size):
            bare.append(bare_rate(model, texts[start : start + size], min(64, options.clients)))
            part = encode[start : start + size]
            rounds.append(asyncio.run(load(server.port, part, options.clients, options.seconds)))
        found["rounds"] = rounds
        found["share"] = round(
            float(np.median([r["requests_per_second"] / b for r, b in zip(rounds, bare, strict=True)])), 3
        )
        found["bare_texts_per_second"] = round(float(np.median(bare)), 1)
        for name in ("requests_per_second", "p50_ms", "p99_ms"):
            found[name] = float(np.median([one[name] for one in rounds]))
        found["search"] = asyncio.run(load(server.port, search[WARM:], options.clients, options.seconds))
        asyncio.run(load(server.port, encode[WARM:], options.clients, options.seconds))
        found["cached"] = asyncio.run(load(server.port, encode[WARM:], options.clients, options.seconds))
        asyncio.run(send_all(server.port, options.bad // 2, seed=1))
        before = server.resident_mb()
        statuses = asyncio.run(send_all(server.port, options.bad, seed=2))
        found["bad"] = {
            "requests": options.bad,
            "statuses": dict(sorted(sum(statuses.values(), Counter()).items())),
            "server_errors": sum(n for one in statuses.values() for status, n in one.items() if status[0] == "5"),
            "anonymous_mb_before": round(before, 1),
            "anonymous_mb_after": round(server.resident_mb(), 1),
        }
        found["still_answers"] = asyncio.run(load(server.port, encode[:8], 1, 30))["statuses"] == {"200": 8}
        found["exit_code"] = server.stop()
        for kind, one in sorted(statuses.items()):
            print(f"{kind:20}{dict(one)}")
    order = ("requests_per_second", "p50_ms", "p99_ms", "bare_texts_per_second", "share")
    return (
        {name: found.pop(name) for name in order}
        | found
        | {
            "clients": options.clients,
            "text_tower": options.text_tower if options.run is None else str(options.run),
            **machine(),
        }
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the run to serve; by default one is made")
    parser.add_argument("--images", type=Path, help="its feature store")
    parser.add_argument("--text-tower", default="minilm", help="of the run that is made")
    parser.add_argument("--dim", type=int, default=384, help="of the run that is made")
    parser.add_argument("--captions", type=Path, help="a table of captions to ask with, each with a number behind it")
    parser.add_argument("--requests", type=int, default=4000, help="of each kind, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each kind of request, at most")
    parser.add_argument("--clients", type=int, default=64, help="connections that ask at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the towers")
    parser.add_argument("--bad", type=int, default=1000, help="bad requests")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        found = measure(options, Path(name))
    for key in ("requests_per_second", "p50_ms", "p99_ms", "bare_texts_per_second", "share", "search", "cached", "bad"):
        print(f"{key:24}{found[key]}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
