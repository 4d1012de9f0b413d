"""The API: routes from HTTP to the engine and back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from torch import Tensor

from litune.serve import messages
from litune.serve.engine import TEMPLATES, Engine
from litune.serve.gate import Gate
from litune.serve.messages import M, read
from litune.serve.openapi import document, known_query
from litune.serve.problems import Problem, answer, answer_problem

PAGE = Path(__file__).parent / "page"
SIZES = (16, 1024)
"""The smallest and the largest thumbnail, in pixels."""


def make_app(engine: Engine, hosts: Collection[str] | None = None, page: Path = PAGE) -> Starlette:
    """The ASGI application that serves an engine, and the page in the folder `page`.

    `hosts` are the host names that requests may use; None: any.
    """
    api = _Api(engine, page)
    get = {
        "/health": api.health,
        "/metrics": api.metrics,
        "/v1/model": api.model,
        "/v1/columns": api.columns,
        "/v1/images": api.images,
        "/v1/images/{row}/picture": api.picture,
    }
    post = {
        "/v1/encode/text": api.encode_text,
        "/v1/encode/image": api.encode_image,
        "/v1/match": api.match,
        "/v1/classify": api.classify,
        "/v1/search": api.search,
    }
    routes: list[Any] = [Route("/openapi.json", api.openapi), Route("/", api.index)]
    for method, paths in (("GET", get), ("POST", post)):
        for path, work in paths.items():
            known = known_query(api.document, path, method)
            routes.append(Route(path, partial(_with_known_query, work, known), methods=[method]))
    if page.is_dir():
        routes.append(Mount("/page", StaticFiles(directory=page)))
    gate = Middleware(
        Gate,
        metrics=engine.metrics,
        token=engine.config.token,
        hosts=hosts,
        upload_bytes=int(engine.config.upload_mb * 1e6),
        body_seconds=engine.config.body_seconds,
        running=engine.config.queue,
    )
    handlers: dict[Any, Any] = {
        Problem: answer_problem,
        HTTPException: _answer_http,
        ClientDisconnect: _answer_nobody,
        500: _answer_failure,
    }

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        engine.stop()

    return Starlette(routes=routes, middleware=[gate], exception_handlers=handlers, lifespan=lifespan)


async def _with_known_query(
    work: Callable[[Request], Awaitable[Response]], known: Sequence[str], request: Request
) -> Response:
    """The answer of `work`. Raises `Problem` for an unknown query parameter, which would otherwise be ignored."""
    if unknown := [name for name in request.query_params if name not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise Problem(
            422, f"there is no parameter {unknown[0][:40]!r} in this path's query: {takes}", unknown[0], "leave it out"
        )
    return await work(request)


class _Api:
    def __init__(self, engine: Engine, page: Path) -> None:
        self.engine, self.page = engine, page
        self.document = document()

    async def health(self, _: Request) -> Response:
        return answer({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _: Request) -> Response:
        return answer(self.document)

    async def index(self, _: Request) -> Response:
        file = self.page / "index.html"
        if not file.is_file():
            raise Problem(404, "this installation has no page", "/", "use the API: /openapi.json describes it")
        return FileResponse(file, headers={"Cache-Control": "no-cache"})

    async def model(self, _: Request) -> Response:
        engine = self.engine
        images = engine.index
        described = {
            "run": engine.name,
            "dim": engine.model.dim,
            "temperature": engine.scale,
            **engine.facts,
            "images": 0 if images is None else len(images),
            "templates": {name: list(templates) for name, templates in TEMPLATES.items()},
            "columns": [] if images is None else engine.metadata.column_names,
        }
        return answer(described)

    async def encode_text(self, request: Request) -> Response:
        body = await _json(request, messages.EncodeText)
        return answer({"features": _numbers(await self.engine.texts(body.texts))})

    async def encode_image(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise _wrong_type("multipart/form-data")
        async with request.form(max_files=messages.MAX_IMAGES, max_fields=0) as form:
            files = form.getlist("images")
            uploads = [file for file in files if isinstance(file, UploadFile)]
            if not uploads or len(form.multi_items()) != len(uploads):
                raise Problem(
                    422, "expected one or more files in the field images, and nothing else", "images",
                    "send multipart/form-data, as curl -F images=@photo.jpg does",
                )  # fmt: skip
            names = [upload.filename or "" for upload in uploads]
            parts = [(name, upload.read) for name, upload in zip(names, uploads, strict=True)]
            return answer({"features": _numbers(await self.engine.pictures(parts)), "names": names})

    async def match(self, request: Request) -> Response:
        body = await _json(request, messages.Match)
        cosines, probabilities = await self.engine.match(body.images, body.texts)
        return answer({"cosines": _numbers(cosines), "probabilities": _numbers(probabilities)})

    async def classify(self, request: Request) -> Response:
        body = await _json(request, messages.Classify)
        known: list[dict[str, Any]]
        if isinstance(body.images, list):
            described = {}
            rows = [image.row for image in body.images if isinstance(image, messages.Row)]
            probabilities = await self.engine.classify(
                await self.engine.images(body.images), body.classes, body.templates
            )
            if rows:
                described = {image["row"]: image for image in self.engine.describe(np.unique(rows))}
            known = [
                described[image.row] if isinstance(image, messages.Row) else {"index": i}
                for i, image in enumerate(body.images)
            ]
        else:
            self.engine.need_images()
            part = body.images
            chosen = self.engine.rows if part == "all" else self.engine.page(part.offset, part.limit)
            probabilities = await self.engine.classify(chosen, body.classes, body.templates)
            known = self.engine.describe(chosen)
        predictions = [
            _prediction(image, body.classes, row) for image, row in zip(known, _numbers(probabilities), strict=True)
        ]
        return answer({"classes": body.classes, "predictions": predictions})

    async def search(self, request: Request) -> Response:
        body = await _json(request, messages.Search)
        if body.text is None and body.image is None:
            raise Problem(422, "a search needs a text, an image or both", "text", "send text, or image, or both")
        if body.text is not None and not body.text.strip():
            raise Problem(422, "the text of the query is empty", "text", "say what to look for, or leave it out")
        return answer({
            "found": [
                {"row": match.row, "key": match.key, "score": round(match.score, 6), "captions": match.captions}
                for match in await self.engine.search(body)
            ]
        })  # fmt: skip

    async def columns(self, _: Request) -> Response:
        return answer({"columns": [asdict(column) for column in await self.engine.columns()]})

    async def images(self, request: Request) -> Response:
        offset = _number(request, "offset", 0, 0, messages.MAX_OFFSET)
        limit = _number(request, "limit", 50, 1, messages.MAX_PAGE)
        where = request.query_params.getlist("where")
        if len(where) > messages.MAX_WHERE or not all(0 < len(text) <= messages.MAX_CONDITION for text in where):
            raise Problem(
                422, f"where takes {messages.MAX_WHERE} conditions of 1 to {messages.MAX_CONDITION} characters",
                "where", "send fewer, or shorter ones",
            )  # fmt: skip
        rows = await self.engine.rows_where(tuple(where))
        return answer({"images": self.engine.describe(rows[offset : offset + limit]), "total": len(rows)})

    async def picture(self, request: Request) -> Response:
        size = _number(request, "size", 256, *SIZES)
        text = request.path_params["row"]
        row = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
        if row < 0:
            raise Problem(404, "a row is a number from 0 on", f"row {text}", "see /v1/images")
        data = await self.engine.picture(row, size)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _prediction(known: dict[str, Any], classes: list[str], probabilities: list[float]) -> dict[str, Any]:
    label = classes[int(np.argmax(probabilities))]
    if "index" in known:
        return {"index": known["index"], "label": label, "probabilities": probabilities}
    own = {} if known["label"] is None else {"own_label": known["label"]}
    return {"row": known["row"], "key": known["key"], "label": label, **own, "probabilities": probabilities}


async def _json(request: Request, kind: type[M]) -> M:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _wrong_type("application/json")
    return read(kind, await request.body())


def _wrong_type(expected: str) -> Problem:
    return Problem(415, f"the body must be {expected}", "Content-Type", f"send it as {expected}")


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if not least <= value <= most:
        raise Problem(422, f"{name} must be a whole number from {least} to {most:,}", f"{name}={text}", "change it")
    return value


def _numbers(values: Tensor) -> list[list[float]]:
    """Numbers for JSON, to seven places: as exact as float32 for features of length one, in half the characters."""
    rounded: list[list[float]] = np.round(values.double().numpy(), 7).tolist()
    return rounded


async def _answer_http(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown paths and methods, unreadable multipart bodies."""
    assert isinstance(error, HTTPException)
    do = {404: "see /openapi.json for the paths", 405: "see /openapi.json for the methods"}
    problem = Problem(
        error.status_code, f"{str(error.detail)[:200]}", f"{request.method} {request.url.path}",
        do.get(error.status_code, "see /openapi.json"), error.headers,
    )  # fmt: skip
    return problem.response()


async def _answer_nobody(_: Request, __: Exception) -> Response:
    """The client disconnected before its request was complete; nobody reads this."""
    return Problem(400, "the body is incomplete", "the body", "send it again").response()


async def _answer_failure(_: Request, __: Exception) -> Response:
    return Problem(500, "the server failed; its log says why", "the server", "report it").response()
