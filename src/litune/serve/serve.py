"""A run over HTTP, with the images of a store."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from litune.config import ServeConfig, command
from litune.errors import ConfigError, LituneError, MissingExtraError, RunError, StoreError
from litune.files import read_json
from litune.index.index import Index
from litune.index.search import say_changes
from litune.model.lit import LiT
from litune.model.run_folder import CONFIG, check_store, load
from litune.progress import say

TOKEN = "LITUNE_TOKEN"


@command(ServeConfig)
def serve(config: ServeConfig) -> None:
    """Serve `config.run` until Ctrl-C or SIGTERM.

    Raises `RunError` for the run, `StoreError` for the images, `ConfigError` where the address can't be bound,
    `MissingExtraError` without the extra `serve`.
    """
    try:
        from litune.serve.app import make_app
        from litune.serve.engine import Engine
        from litune.serve.server import listen, make_server
    except ModuleNotFoundError as why:
        raise MissingExtraError("litune serve", str(why.name), "serve") from None
    if config.token is None and os.environ.get(TOKEN):
        try:
            config = dataclasses.replace(config, token=os.environ[TOKEN])
        except ConfigError as why:
            raise ConfigError(str(why).replace("--token", f"the environment variable {TOKEN}")) from None
    with listen(config.host, config.port) as sock:
        if config.threads:
            torch.set_num_threads(config.threads)
        model = load(config.run, image_tower=config.image_tower, device=config.device)
        index = None if config.images is None else open_images(config.run, config.images, model, config.index)
        if index is not None and model.bank is not None and config.hub_correction:
            index.corrections(model)  # so that the first search need not wait
        engine = Engine(model, index, config, Path(config.run).resolve().name, describe(config.run, model))
        app = make_app(engine, known_hosts(config))
        make_server(app, config.body_seconds, partial(announce, config, index, sock.getsockname()[1])).run([sock])
    say("stopped")


def announce(config: ServeConfig, index: Index | None, port: int) -> None:
    """Say at which address the server is, and who can reach it."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    images = "" if index is None else f", {len(index):,} images"
    address = f"http://{host}:{port}"
    if config.token is None and not is_loopback(config.host):
        say("anyone who reaches this address can ask: set a token in LITUNE_TOKEN to change that")
    say(f"serving {config.run}{images} at {address}/ (the API: {address}/openapi.json); Ctrl-C ends it")


def open_images(run: Path, path: Path, model: LiT, how: str) -> Index:
    """The index of the images that are served. Raises `StoreError` where they are of another tower than the run."""
    index = Index(path)
    say_changes(index)
    check_store(run, model, index.store.made_with)
    if how == "approximate" and index.cells is None:
        raise StoreError(f"{path} has no index: build one with  litune search {run} {path} QUERY --index approximate")
    return index


def describe(run: Path, model: LiT) -> dict[str, Any]:
    """What /v1/model says of the towers. Loads the image tower, so that the first request need not wait."""
    try:
        model.load_image_tower()
        encodes = True
    except LituneError as why:
        say(f"pictures can't be encoded, only texts and stored images: {why}")
        encodes = False
    settings = read_json(run / CONFIG, RunError) if (run / CONFIG).exists() else {}
    return {
        "text_tower": settings.get("text_tower") or model.text.architecture.get("kind"),
        "image_tower": (model.image_provenance or {}).get("spec"),
        "can_encode_images": encodes,
    }


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def known_hosts(config: ServeConfig) -> set[str] | None:
    """The host names that requests may use; None: any.

    A web page elsewhere can point a name of its own at 127.0.0.1 and then read a local server's answers (DNS
    rebinding): on a loopback address only its usual names are accepted.
    """
    if is_loopback(config.host):
        return {"localhost", "127.0.0.1", "[::1]", config.host, *config.allow_host}
    return set(config.allow_host) or None
