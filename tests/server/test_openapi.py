"""Whatever a client sends is answered as `/openapi.json` says: schemathesis makes requests from it, good and bad."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.waiting import HANG_S

OPERATIONS = (
    "POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/chat/completions", "POST /v1/quotes",
    "POST /v1/videos", "POST /v1/videos/sync", "GET /v1/videos", "GET /v1/videos/{video_id}",
    "DELETE /v1/videos/{video_id}", "GET /v1/videos/{video_id}/content", "POST /v1/videos/{video_id}/remix",
    "GET /v1/models",
    "GET /v1/models/{model_id}", "GET /v1/images/links/{name}",
    "GET /debug/trace", "GET /health", "GET /ready", "GET /metrics",
)  # fmt: skip
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SERVED = {"prompt": "a lighthouse", "size": "64x64", "num_inference_steps": 2}
thorough = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def described() -> Iterator[schemathesis.BaseSchema]:
    """The document of a server whose tasks take no time."""
    command = [sys.executable, str(Path(__file__).parent / "fake_engine.py"), "--instant", "--videos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "launching\n"
        url = program.stdout.readline().strip()
        try:
            document = httpx.get(f"{url}/openapi.json", timeout=HANG_S).json()
            # "Any other error" would make every status a documented one.
            for operation in (operation for path in document["paths"].values() for operation in path.values()):
                operation["responses"].pop("default", None)
            described = schemathesis.openapi.from_dict(document)
            described.config.update(base_url=url)
            yield described
        finally:
            program.terminate()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_answer_is_documented_and_none_is_a_5xx(
    described: schemathesis.BaseSchema, name: str, mode: GenerationMode
) -> None:
    method, path = name.split()

    @thorough
    @given(case=described[path][method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    try:
        check()
    except Unsatisfiable:
        pytest.skip("nothing can be wrong with a request without parameters")


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/quotes", "/v1/videos"])
def test_so_it_is_where_most_of_the_body_can_be_served(described: schemathesis.BaseSchema, path: str) -> None:
    """Alone, hardly any body that the document allows gets past the first check."""
    statuses = set()

    @thorough
    @given(case=described[path]["POST"].as_strategy())
    def check(case: schemathesis.Case) -> None:
        kept = ("n", "stream", "response_format", "user", "quality", "slo_ms", "deadline_policy")
        if isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name in kept} | SERVED
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    check()
    assert 200 in statuses
