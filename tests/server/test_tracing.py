"""OpenTelemetry: a span per exchange, image, stage and task, below the client's own span."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from itertools import pairwise

import pytest
from fake_engine import FAILING

from tetriserve.config import ServerConfig
from tetriserve.core.errors import ConfigError
from tetriserve.server import EngineSlot, serve

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

from tetriserve.server.tracing import Tracing  # noqa: E402

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "64x64", "num_inference_steps": 3, "slo_ms": 600_000}
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
async def traced(engine, connect, spans):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    async with connect(EngineSlot(engine), Tracing(provider)) as client:
        yield client


def children(spans, parent):
    below = [span for span in spans if span.parent is not None and span.parent.span_id == parent.context.span_id]
    return sorted(below, key=lambda span: span.start_time)


async def test_an_image_is_a_tree_of_spans_below_the_clients_own(traced, spans):
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "X-Request-Id": "r1"}
    answer = await traced.post(URL, json=BODY, headers=headers)
    schedule = answer.json()["data"][0]["schedule"]
    ended = spans.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in ended} == {TRACE_ID}
    (exchange,) = [span for span in ended if span.name == f"POST {URL}"]
    assert f"{exchange.parent.span_id:016x}" == SPAN_ID
    assert exchange.attributes["http.response.status_code"] == 200
    assert exchange.attributes["tetriserve.request_id"] == "r1"

    (image,) = children(ended, exchange)
    assert image.name == "image"
    assert (image.attributes["tetriserve.size"], image.attributes["tetriserve.attained"]) == ("64x64", True)
    assert (image.end_time - image.start_time) / 1e9 == pytest.approx(schedule["latency_s"], abs=1e-5)
    stages = children(ended, image)
    assert [stage.name for stage in stages] == ["encode", "denoise", "decode"]
    assert all(before.end_time <= after.start_time for before, after in pairwise(stages))
    tasks = [task for stage in stages for task in children(ended, stage)]
    assert [list(task.attributes["tetriserve.ranks"]) for task in tasks] == [run["ranks"] for run in schedule["runs"]]
    assert [task.attributes["tetriserve.num_steps"] for task in tasks] == [run["num_steps"] for run in schedule["runs"]]
    for task, run in zip(tasks, schedule["runs"], strict=True):
        assert (task.end_time - task.start_time) / 1e9 == pytest.approx(run["end_s"] - run["start_s"], abs=1e-5)


async def test_images_of_clients_at_once_keep_to_their_own_exchange(traced, spans):
    await asyncio.gather(*(traced.post(URL, json={**BODY, "n": n}) for n in (1, 2, 3)))
    ended = spans.get_finished_spans()
    exchanges = [span for span in ended if span.name == f"POST {URL}"]
    assert sorted(len(children(ended, exchange)) for exchange in exchanges) == [1, 2, 3]
    assert len({span.context.trace_id for span in exchanges}) == 3


async def test_failures_are_errors_and_refusals_are_not(traced, spans):
    await traced.post(URL, json={**BODY, "prompt": FAILING})
    await traced.post(URL, json={**BODY, "n": 0})
    by_name = {(span.name, span.status.status_code.name) for span in spans.get_finished_spans()}
    assert {("image", "ERROR"), (f"POST {URL}", "ERROR"), (f"POST {URL}", "UNSET")} <= by_name


async def test_a_client_that_is_not_sampled_is_not_traced(traced, spans):
    await traced.post(URL, json=BODY, headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"})
    assert spans.get_finished_spans() == ()


async def test_probes_make_no_spans(traced, spans):
    await traced.get("/health")
    await traced.get("/metrics")
    assert spans.get_finished_spans() == ()


async def test_the_log_line_names_the_trace(traced, caplog):
    with caplog.at_level("INFO", "tetriserve.server"):
        await traced.post(URL, json=BODY, headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"})
    assert f"trace_id={TRACE_ID}" in caplog.records[0].getMessage()


async def test_a_broken_traceparent_starts_a_trace_of_its_own(traced, spans):
    assert (await traced.post(URL, json=BODY, headers={"traceparent": "nonsense"})).status_code == 200
    (exchange,) = [span for span in spans.get_finished_spans() if span.name == f"POST {URL}"]
    assert exchange.parent is None


async def test_without_the_extra_the_option_is_one_clear_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "tetriserve.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    config = ServerConfig(port=0, otlp_traces_endpoint="http://localhost:4318/v1/traces")
    with pytest.raises(ConfigError, match=r"needs the package opentelemetry\..*pip install 'tetriserve\[otel\]'"):
        await serve(config, lambda: pytest.fail("launched"))


async def test_a_collectors_password_is_not_logged_when_it_cannot_be_reached(caplog):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with caplog.at_level(logging.DEBUG):
        exporter = OTLPSpanExporter(endpoint=f"http://user:hush@127.0.0.1:{port}/v1/traces", timeout=0.5)
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        provider.get_tracer("test").start_span("a").end()
        provider.shutdown()
    assert caplog.records
    assert "hush" not in caplog.text
