"""What every request passes before and after the API: access, limits of size and time, headers and metrics."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Collection
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litune.serve.engine import busy
from litune.serve.metrics import Metrics
from litune.serve.problems import Problem

JSON_BYTES = 8 << 20
UPLOADS = "/v1/encode/image"
OPEN = ("/health", "/openapi.json", "/", "/favicon.ico")
"""Paths that need no token: they reveal nothing about run and images."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_PATHS = re.compile(
    r"/v1/(?:model|encode/text|encode/image|match|classify|search|columns|images)|/health|/metrics|/openapi.json|/"
)


STOPPING = Problem(503, "the server is stopping", "the server", "ask again when it is back", {"Connection": "close"})


class Gate:
    """ASGI middleware: host names, token, number and size of requests, time of their bodies; headers and metrics."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        token: str | None,
        hosts: Collection[str] | None,
        upload_bytes: int,
        body_seconds: float,
        running: int,
    ) -> None:
        self.app, self.metrics, self.upload_bytes, self.seconds = app, metrics, upload_bytes, body_seconds
        self.token = None if token is None else token.encode()
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.limit, self.running = running, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith("/page/"):  # files of two versions do not work together
                    headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        self.running += 1
        self.metrics.running.set(self.running)
        try:
            try:
                self._check(scope)
            except Problem as problem:
                await problem.response()(scope, receive, sending)
            else:
                await self.app(scope, self._bounded(scope, receive), sending)
        except asyncio.CancelledError:  # the server is stopping, and this request exceeded its grace period
            with suppress(Exception):
                if status == 500:
                    await STOPPING.response()(scope, receive, sending)
        finally:
            self.running -= 1
            self.metrics.running.set(self.running)
            path = path_name(scope["path"])
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
            self.metrics.requests.labels(method, path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self.hosts is not None:
            host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
            if host not in self.hosts:
                raise Problem(
                    421, "the server is not known by this name", f"Host: {host}", "start it with --allow-host"
                )
        if self.token is not None and scope["path"] not in OPEN and not scope["path"].startswith("/page/"):
            given = headers.get("authorization", "")
            kind, _, token = given.partition(" ")
            right = hmac.compare_digest(token.strip().encode("utf-8", "surrogateescape"), self.token)
            if kind.lower() != "bearer" or not right:
                raise Problem(
                    401, "the token is missing or wrong", "Authorization", "send 'Authorization: Bearer TOKEN'",
                    {"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if self.running > self.limit:
            raise busy()
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most(scope):
            raise self._too_large(scope)

    def _most(self, scope: Scope) -> int:
        return self.upload_bytes if scope["path"] == UPLOADS else JSON_BYTES

    def _too_large(self, scope: Scope) -> Problem:
        return Problem(
            413, f"the body is larger than {self._most(scope) / 1e6:,.0f} MB", "the body", "send less at once",
            {"Connection": "close"},
        )  # fmt: skip

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, raising `Problem` where the body gets too large or takes too long."""
        deadline, received, done = time.monotonic() + self.seconds, 0, False

        async def receiving() -> Message:
            nonlocal received, done
            if done:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except TimeoutError:
                raise Problem(
                    408, f"the body took longer than {self.seconds:g} seconds to arrive", "the body",
                    "send less at once, or over a faster connection", {"Connection": "close"},
                ) from None  # fmt: skip
            received += len(message.get("body", b""))
            if received > self._most(scope):
                raise self._too_large(scope)
            done = not message.get("more_body", False)
            return message

        return receiving


def path_name(path: str) -> str:
    """A request's path as metrics name it, with few distinct names whatever clients send."""
    if _PATHS.fullmatch(path):
        return path
    if re.fullmatch(r"/v1/images/[^/]*/picture", path):
        return "/v1/images/{row}/picture"
    return "/page" if path.startswith("/page/") else "other"
