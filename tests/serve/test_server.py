"""A server on a socket, with clients that are many, slow, rude or gone."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.forked import quick_python
from tests.serve.conftest import Live, Made

from litune.config import ServeConfig
from litune.errors import ConfigError
from litune.model.lit import LiT
from litune.serve.serve import known_hosts, serve
from litune.serve.server import listen

Serve = Callable[..., Live]


def post(live: Live, path: str, body: Any) -> tuple[int, Any]:
    connection = live.connect()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def talk(live: Live, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the server says to these bytes, sent one after the other."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
        for part in parts:
            sock.sendall(part)
            time.sleep(pause)
        found = b""
        while data := sock.recv(65536):
            found += data
        return found


def test_many_at_once_get_their_own_answers(live: Serve, model: LiT) -> None:
    server = live(batch_ms=30.0)
    texts = [f"a {color} box number {i}" for i, color in enumerate(("red", "green", "blue", "yellow") * 8)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: post(server, "/v1/encode/text", {"texts": [text]}), texts))
    assert {status for status, _ in answers} == {200}
    found = [body["features"][0] for _, body in answers]
    assert np.allclose(found, model.encode_text(texts), atol=1e-6)
    connection = server.connect()
    connection.request("GET", "/metrics")
    counted = connection.getresponse().read().decode()
    batches = re.search(r'litune_batch_size_count{kind="texts"} ([\d.]+)', counted)
    assert batches is not None
    assert float(batches[1]) < len(texts) / 2  # they were encoded together
    connection.close()


def test_a_full_queue_says_when_to_come_back(live: Serve) -> None:
    server = live(queue=2, batch=1, batch_ms=300.0, body_seconds=1.0)
    waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    for one in waiting:
        one.sendall(b"POST /v1/encode/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n"
                    b"Content-Type: application/json\r\n\r\n")  # fmt: skip
    time.sleep(0.2)
    connection = server.connect()
    connection.request("GET", "/v1/model")
    answer = connection.getresponse()
    assert answer.status == 429
    assert int(answer.headers["Retry-After"]) > 0
    assert "too many requests" in json.loads(answer.read())["error"]["message"]
    for one in waiting:
        assert b" 408 " in one.recv(65536).splitlines()[0]
        one.close()
    connection.request("GET", "/v1/model")
    assert connection.getresponse().status == 200
    connection.close()


def test_slow_and_broken_clients(live: Serve) -> None:
    server = live(body_seconds=0.5)
    head = b"POST /v1/encode/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    cases = {
        "slow body": ((head + b"Content-Length: 99\r\n\r\n{", b'"texts"', b":"), b"408", 0.4),
        "half a head": ((head[:30],), b"408", 0.0),
        "nothing": ((), b"408", 0.0),
        "drops of a head": ((b"GET / HTTP/1.1\r\n", b"Host: 127.0.0.1\r\n", b"X: y\r\n"), b"408", 0.2),
        "no HTTP": ((b"\x16\x03\x01\x02\x00\x01\r\n\r\n",), b"400", 0.0),
        "two lengths": ((head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",), b"400", 0.0),
        "wrong chunks": ((head + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",), b"400", 0.0),
    }
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = {
            name: pool.submit(talk, server, *parts, pause=pause) for name, (parts, _, pause) in cases.items()
        }  # fmt: skip
        for name, (_, status, _) in cases.items():
            answer = answers[name].result()
            assert answer.split(b" ")[1] == status, (name, answer)
            assert b'{"error":' in answer.replace(b'": ', b'":'), (name, answer)
    for cut in (b"", b"{"):  # clients that go away
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(head + b"Content-Length: 99\r\n\r\n" + cut)
    assert post(server, "/v1/encode/text", {"texts": ["a"]})[0] == 200


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = listen("127.0.0.1", 0)
    with pytest.raises(ConfigError, match=r"can't listen on 127.0.0.1, port \d+: Address already in use"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()
    with pytest.raises(ConfigError, match="can't listen on 203.0.113.7"):
        listen("203.0.113.7", 0)
    assert known_hosts(ServeConfig(run=tmp_path)) == {"localhost", "127.0.0.1", "[::1]"}
    assert "cat.example" in (known_hosts(ServeConfig(run=tmp_path, allow_host=("cat.example",))) or ())
    assert known_hosts(ServeConfig(run=tmp_path, host="0.0.0.0")) is None
    for token in ("short", "with a blank in it", "umlaut-ü-umlaut"):
        with pytest.raises(ConfigError, match="--token must have"):
            ServeConfig(run=tmp_path, token=token)
        monkeypatch.setenv("LITUNE_TOKEN", token)
        with pytest.raises(ConfigError, match="^the environment variable LITUNE_TOKEN must have"):
            serve(run=tmp_path)


def test_the_command_ends_in_order(made: Made) -> None:
    """SIGTERM: the request that is running gets its answer, then the process ends with 0."""
    command = [quick_python(), "-m", "litune", "serve", str(made.run), "--images", str(made.store), "--port", "0"]
    environment = os.environ | {"LITUNE_TOKEN": "sesame-open", "PYTHONPATH": os.pathsep.join([*sys.path])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    try:
        found = re.search(r"12 images at http://127.0.0.1:(\d+)/", line)
        assert found is not None, line
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/v1/model")
        answer = connection.getresponse()
        assert (answer.status, answer.read()[:9]) == (401, b'{"error":')
        body = b'{"texts":["a"]}'
        connection.putrequest("POST", "/v1/encode/text")
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Authorization", "Bearer sesame-open"),
        ):
            connection.putheader(name, value)
        connection.endheaders(body[:5])
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        threading.Timer(0.5, lambda: connection.send(body[5:])).start()
        answer = connection.getresponse()
        assert answer.status == 200
        assert len(json.loads(answer.read())["features"]) == 1
        connection.close()
        assert process.wait(30) == 0
        *before, last = process.stderr.read().splitlines()
        assert last == "stopped"
        assert all("still running: 1" in line for line in before)
    finally:
        process.kill()
        process.stderr.close()
