"""uvicorn, with deadlines for slow clients and a graceful shutdown."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from litune.errors import ConfigError
from litune.progress import say

GRACE = 30
"""Seconds that running requests have to finish at shutdown."""


class _Patient(H11Protocol):
    """HTTP/1.1 with a deadline for a request's head; uvicorn alone would wait for ever."""

    head_seconds = 20.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def _watch(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._look, self.cycle)

    def _look(self, before: Any, again: bool = True) -> None:
        """Refuse a client that has sent no complete head since the last look."""
        begun = self.cycle is None or (self.cycle.response_complete and self.conn.trailing_data[0])
        if not begun or self.cycle is not before or self.transport.is_closing():
            self._watch()
        elif again:  # on a busy machine the rest may have arrived and not been read yet
            self._timer = self.loop.call_later(0.05, self._look, before, False)
        else:
            self._refuse(408, "Request Timeout", "the head of the request took too long to arrive")

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Bad Request", msg)

    def _refuse(self, status: int, reason: str, message: str) -> None:
        error = {"error": {"message": message, "what": "the request", "do": "send a whole HTTP/1.1 request"}}
        body = json.dumps(error)
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self.transport.write(f"{head}\r\nconnection: close\r\n\r\n{body}".encode())
        self.transport.close()


class _Server(uvicorn.Server):
    """Stops after SIGINT or SIGTERM; uvicorn's own would raise the signal again."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        if running := len(self.server_state.tasks):
            say(f"stopping; requests that are still running: {running:,}, for at most {GRACE} seconds; Ctrl-C: at once")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals go to the main thread
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` where the address can't be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as why:
        reason = (getattr(why, "strerror", None) or str(why)).partition(" (while ")[0]
        raise ConfigError(
            f"can't listen on {host}, port {port}: {reason}; choose another --host, or --port (0: any)"
        ) from None


def make_server(app: ASGIApp, seconds: float, on_start: Callable[[], None]) -> _Server:
    """A server of the application that waits `seconds` for a request's head."""
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    protocol = type("Protocol", (_Patient,), {"head_seconds": seconds})
    config = uvicorn.Config(
        app, http=protocol, ws="none", loop="asyncio", lifespan="on", log_level="warning", access_log=False,
        server_header=False, timeout_graceful_shutdown=GRACE,
    )  # fmt: skip
    return _Server(config, on_start)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record is about the server, not about what a client sent."""
    return not record.getMessage().startswith(("Invalid HTTP request", "Unsupported upgrade", "No supported WebSocket"))
