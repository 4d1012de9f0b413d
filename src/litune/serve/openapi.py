"""The OpenAPI document, generated from the classes that validate requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from litune.serve import messages

REFUSALS = {
    "400": "The body can't be read",
    "401": "The token is missing or wrong",
    "404": "There is nothing of that name or number",
    "408": "The body took too long to arrive",
    "409": "The server was started without images, or without an image tower",
    "413": "The body is too large",
    "415": "The body is of another type",
    "421": "The server is not known by this name",
    "422": "The request does not fit its schema or this run and store, or its query has an unknown parameter",
    "429": "Too many requests are waiting; see Retry-After",
}


def document() -> dict[str, Any]:
    """The document, as plain JSON values."""
    kinds: list[type[BaseModel]] = [*messages.REQUESTS, *messages.ANSWERS]
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    paths = {
        "/health": {"get": _get("That the server answers", messages.Health, secured=False)},
        "/metrics": {"get": _operation("Counters in Prometheus' text format", "text/plain", {"type": "string"})},
        "/v1/model": {"get": _get("The model, its towers, and the columns of its images", messages.ModelFacts)},
        "/v1/encode/text": {"post": _post("Features of texts", messages.EncodeText, messages.Encoded)},
        "/v1/encode/image": {"post": _upload()},
        "/v1/match": {"post": _post("Compare images and texts", messages.Match, messages.Matched)},
        "/v1/classify": {"post": _post("Classify images by names", messages.Classify, messages.Classified)},
        "/v1/search": {"post": _post("Find images", messages.Search, messages.FoundImages)},
        "/v1/columns": {"get": _get("What `where` can ask for: columns, and their values where few", messages.Columns)},
        "/v1/images": {
            "get": _get("Some images of the store", messages.StoredImages, [
                _query("offset", 0, 0, messages.MAX_OFFSET), _query("limit", 50, 1, messages.MAX_PAGE),
                {"name": "where", "in": "query", "required": False, "schema": _where(), "explode": True},
            ])
        },
        "/v1/images/{row}/picture": {
            "get": _operation("A thumbnail", "image/jpeg", {"type": "string", "format": "binary"}, [
                {"name": "row", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}},
                _query("size", 256, 16, 1024),
            ])
        },
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "litune", "version": "1", "description": "A locked image tower that can be read by texts."},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def known_query(document: dict[str, Any], path: str, method: str) -> list[str]:
    """The names of the parameters that an operation of the document takes in its query."""
    return [item["name"] for item in document["paths"][path][method.lower()]["parameters"] if item["in"] == "query"]


def _where() -> dict[str, Any]:
    condition = {"type": "string", "minLength": 1, "maxLength": messages.MAX_CONDITION}
    return {"type": "array", "items": condition, "maxItems": messages.MAX_WHERE}


def _post(summary: str, request: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    return _get(summary, reply) | {"requestBody": body}


def _get(
    summary: str, reply: type[BaseModel], parameters: list[dict[str, Any]] | None = None, *, secured: bool = True
) -> dict[str, Any]:
    return _operation(summary, "application/json", _ref(reply), parameters, secured=secured)


def _operation(
    summary: str,
    kind: str,
    schema: dict[str, Any],
    parameters: list[dict[str, Any]] | None = None,
    *,
    secured: bool = True,
) -> dict[str, Any]:
    error = {"application/json": {"schema": _ref(messages.Error)}}
    answers = {status: {"description": text, "content": error} for status, text in REFUSALS.items()}
    operation = {
        "summary": summary,
        "parameters": parameters or [],
        "responses": {"200": {"description": summary, "content": {kind: {"schema": schema}}}, **answers},
    }
    return operation | ({"security": [{"token": []}, {}]} if secured else {})


def _upload() -> dict[str, Any]:
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    files |= {"maxItems": messages.MAX_IMAGES}
    schema = {"type": "object", "properties": {"images": files}, "required": ["images"], "additionalProperties": False}
    body = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return _get("Features of pictures", messages.EncodedImages) | {"requestBody": body}


def _query(name: str, default: int, least: int, most: int) -> dict[str, Any]:
    schema = {"type": "integer", "default": default, "minimum": least, "maximum": most}
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _ref(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
