"""OpenTelemetry spans: one per HTTP exchange, and under it one per image, stage and task. Needs the extra `otel`.

An image's spans are made from its runs once it has ended, so that tracing costs nothing while tasks are planned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import groupby

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tetriserve.core.events import Run, Submitted
from tetriserve.core.request import Request
from tetriserve.engine import LiveEngine, Observation, Occurred
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST, Exchange
from tetriserve.workload.outcome import Outcome, Status


def open_tracing(endpoint: str) -> Tracing:
    """Tracing to a collector that takes OTLP over HTTP. OpenTelemetry's own `OTEL_*` variables hold, as anywhere."""
    resource = Resource.create({"service.name": "tetriserve", "service.version": version("tetriserve")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)


class Tracing:
    """Makes spans of one app's exchanges, and of the images of one engine.

    A client's own span, named in the header `traceparent` (W3C Trace Context), becomes the exchange's parent.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tetriserve", version("tetriserve"))
        self._parents: dict[str, Context] = {}

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app` with a span around every exchange below `/v1/`."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
                await app(scope, receive, send)
                return
            exchange: Exchange = scope["state"]["exchange"]
            parent = TraceContextTextMapPropagator().extract(Headers(scope=scope))
            with self._tracer.start_as_current_span(scope["method"], parent, SpanKind.SERVER) as span:
                exchange.facts["trace_id"] = trace.format_trace_id(span.get_span_context().trace_id)
                status = 500
                try:
                    await app(scope, receive, send)
                    status = exchange.status or CLIENT_CLOSED_REQUEST
                finally:
                    _describe_exchange(span, scope, exchange, status)

        return traced

    def attach(self, engine: LiveEngine) -> None:
        def observe(observation: Observation) -> None:
            match observation:
                case Occurred(Submitted(request)):
                    self._note_parent(request)
                case Outcome():
                    self._trace_image(observation, origin_ns=time.time_ns() - int(engine.now * 1e9))

        engine.subscribe(observe)

    def close(self) -> None:
        """Send what is left. Blocks for seconds when nobody takes it."""
        self._provider.shutdown()

    def _note_parent(self, request: Request) -> None:
        """The span of the exchange is current while its handler submits: OpenTelemetry's context follows the task."""
        self._parents[request.request_id] = trace.set_span_in_context(trace.get_current_span(), Context())

    def _trace_image(self, outcome: Outcome, origin_ns: int) -> None:
        """The image's span and those below it. `origin_ns` is the wall-clock time of the engine's start."""

        def ns(time_s: float) -> int:
            return origin_ns + int(time_s * 1e9)

        request = outcome.request
        parent = self._parents.pop(request.request_id, None)
        image = self._tracer.start_span("image", parent, start_time=ns(request.arrival_s))
        image.set_attributes(
            {
                "tetriserve.image_id": request.request_id,
                "tetriserve.size": str(request.shape),
                "tetriserve.num_steps": request.num_steps,
                "tetriserve.status": outcome.status.value,
                "tetriserve.attained": outcome.is_attained,
                "tetriserve.slack_s": request.deadline_s - outcome.finish_s,
                "tetriserve.queued_s": outcome.queued_s,
            }
        )
        if request.model:
            image.set_attribute("tetriserve.model", request.model)
        if outcome.status is Status.FAILED:
            image.set_status(StatusCode.ERROR, outcome.message)
        self._trace_runs(outcome.runs, trace.set_span_in_context(image, Context()), ns)
        image.end(ns(outcome.finish_s))

    def _trace_runs(self, runs: Sequence[Run], in_image: Context, ns: Callable[[float], int]) -> None:
        for stage, group in groupby(runs, lambda run: run.task.stage):
            stage_runs = list(group)
            span = self._tracer.start_span(stage, in_image, start_time=ns(stage_runs[0].start_s))
            in_stage = trace.set_span_in_context(span, Context())
            for run in stage_runs:
                task = self._tracer.start_span("task", in_stage, start_time=ns(run.start_s))
                task.set_attribute("tetriserve.ranks", run.task.ranks)
                task.set_attribute("tetriserve.degree", run.task.degree)
                task.set_attribute("tetriserve.num_steps", run.task.num_steps)
                task.end(ns(run.end_s))
            span.end(ns(stage_runs[-1].end_s))


def _describe_exchange(span: Span, scope: Scope, exchange: Exchange, status: int) -> None:
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("http.request.method", scope["method"])
    span.set_attribute("http.response.status_code", status)
    span.set_attribute("tetriserve.request_id", exchange.request_id)
    if status >= 500:
        span.set_status(StatusCode.ERROR, exchange.error_code)
