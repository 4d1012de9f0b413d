"""Error answers: what is wrong with a request in one line, the value it is about, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

MAX_QUOTED = 200


class Problem(Exception):  # noqa: N818 - an answer, as HTTP has it
    """A request that can't be answered: its status, what is wrong, with which part of the request, and the remedy."""

    def __init__(self, status: int, message: str, what: str, do: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.what, self.do = status, message, what, do
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The answer as JSON: {"error": {"message", "what", "do"}}."""
        error = {"message": self.message, "what": self.what[:MAX_QUOTED], "do": self.do}
        return answer({"error": error}, self.status, self.headers)


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response. Plain ASCII, so that no text can fail to be encoded."""
    body = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


async def answer_problem(_: Request, problem: Exception) -> Response:
    """Starlette's handler of `Problem`."""
    assert isinstance(problem, Problem)
    return problem.response()
