"""The OpenAPI document is true: schemathesis makes valid and invalid requests of it and holds the answers to it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import pytest
from tests.serve.conftest import Start

from litune.serve.app import make_app

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

CHECKED = ("status_code_conformance", "content_type_conformance", "response_schema_conformance", "not_a_server_error")


@pytest.mark.filterwarnings("ignore")
def test_generated_requests(start: Start) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(start()))
    checks = [getattr(schemathesis.checks, name) for name in CHECKED]
    seen: dict[str, set[int]] = {}
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:
            cases = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=cases)
            def ask(case: Any) -> None:
                response = case.call_and_validate(checks=checks)
                seen.setdefault(case.operation.label, set()).add(response.status_code)

            with suppress(Unsatisfiable):  # nothing about a plain GET can be wrong
                ask()
    assert len(seen) == 11
    assert seen["GET /health"] == {200}
    for name in ("POST /v1/search", "POST /v1/match", "POST /v1/classify", "POST /v1/encode/text"):
        assert seen[name] & {400, 422}, seen
    assert 200 in seen["POST /v1/encode/text"]
    assert max(status for found in seen.values() for status in found) < 500
