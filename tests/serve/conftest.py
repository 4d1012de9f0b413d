"""A run, its images and a server of both, made once."""

from __future__ import annotations

import csv
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from tests.conftest import COLORS, SHAPES, draw

import litune
from litune.config import ServeConfig
from litune.model.lit import LiT
from litune.serve.app import make_app
from litune.serve.engine import Engine
from litune.serve.serve import describe, open_images
from litune.serve.server import _Server, listen, make_server

TOWER = """
import numpy as np
import torch
def preprocess(image):
    return np.asarray(image.resize((32, 32))).transpose(2, 0, 1)
def encode(pixels):
    return torch.nn.functional.avg_pool2d(pixels.float() / 255, 8).flatten(1)
def make():
    return encode, preprocess
"""


@dataclass(frozen=True)
class Made:
    run: Path
    store: Path
    photos: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Made]:
    """12 pictures with captions and labels, embedded, and a run tuned on them."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "servedtower.py").write_text(TOWER)
    for color in COLORS:
        (folder / "photos" / color).mkdir(parents=True)
        for shape in SHAPES:
            draw(color, shape).save(folder / "photos" / color / f"{shape}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        litune.embed(folder / "photos", image_tower="python:servedtower:make", out=folder / "store")
        with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            writer.writerows([f"{c}/{s}.png", f"a {c} {s}"] for c in COLORS for s in SHAPES)
        litune.embed(
            folder / "captions.csv", images=folder / "photos", image_tower="python:servedtower:make",
            out=folder / "pairs",
        )  # fmt: skip
        litune.tune(
            folder / "pairs", text_tower=f"hf:{tiny_bert}", out=folder / "run", duration="120pairs", batch_size=6,
            evaluations=0, precision="float32", device="cpu",
        )  # fmt: skip
        yield Made(folder / "run", folder / "store", folder / "photos")


@pytest.fixture(scope="session")
def model(made: Made) -> LiT:
    return litune.load(made.run, device="cpu")


Start = Callable[..., Engine]


@pytest.fixture
def start(made: Made, model: LiT) -> Iterator[Start]:
    """Makes engines with other settings; all are stopped at the end."""
    engines = []

    def make(images: bool = True, **settings: object) -> Engine:
        config = ServeConfig(run=made.run, **settings)  # type: ignore[arg-type]
        index = open_images(made.run, made.store, model, config.index) if images else None
        engines.append(Engine(model, index, config, "run", describe(made.run, model)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def client(start: Start) -> TestClient:
    return TestClient(make_app(start()))


class Live:
    """A server on a port of this machine, in a thread."""

    def __init__(self, engine: Engine) -> None:
        sock = listen("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        started = threading.Event()
        app = make_app(engine, {"127.0.0.1"})
        self.server: _Server = make_server(app, engine.config.body_seconds, started.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]})
        self.thread.start()
        started.wait(30)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)


@pytest.fixture
def live(start: Start) -> Iterator[Callable[..., Live]]:
    """Starts live servers with other settings."""
    running = []

    def make(**settings: object) -> Live:
        running.append(Live(start(**settings)))
        return running[-1]

    yield make
    for one in running:
        one.stop()
