"""Prometheus metrics of one app, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tetriserve.core.request import Shape
from tetriserve.core.trajectory import Stage
from tetriserve.engine import LiveEngine
from tetriserve.server.slot import EngineSlot
from tetriserve.workload.outcome import Outcome, Status

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
_SLACK = (*(-seconds for seconds in reversed(_SECONDS)), 0.0, *_SECONDS)


class Metrics:
    """Counts outcomes of the slot's engine from the moment it is there, and HTTP exchanges from the start.

    Sizes outside the profile share the label "other": clients choose sizes, and labels live for ever.
    """

    def __init__(self, slot: EngineSlot) -> None:
        self._registry = registry = CollectorRegistry()
        self._sizes: frozenset[Shape] = frozenset()
        self._exchanges = Counter(
            "tetriserve_http_requests", "HTTP requests.", ("route", "method", "status"), registry=registry
        )
        self._requests = Counter("tetriserve_requests", "Images by end.", ("status", "size"), registry=registry)
        self._attained = Counter(
            "tetriserve_requests_attained", "Images finished by their deadline.", ("size",), registry=registry
        )
        self._missed = Counter(
            "tetriserve_requests_missed", "Images that failed or finished late.", ("size",), registry=registry
        )
        self._latency = Histogram(
            "tetriserve_request_latency_seconds",
            "Arrival to finish of finished images.",
            ("size",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._queued = Histogram(
            "tetriserve_request_queued_seconds",
            "Time in which no rank worked for a finished image.",
            ("size",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._slack = Histogram(
            "tetriserve_deadline_slack_seconds",
            "Deadline minus finish of finished images; negative is late.",
            ("size",),
            buckets=_SLACK,
            registry=registry,
        )
        self._steps = Counter("tetriserve_steps", "Denoise steps by degree.", ("degree",), registry=registry)
        self._rank_seconds = Counter(
            "tetriserve_rank_seconds", "Rank time of ended images by stage.", ("stage",), registry=registry
        )
        self._model = Info("tetriserve_model", "The served model.", registry=registry)
        Info("tetriserve_build", "This server.", registry=registry).info({"version": version("tetriserve")})
        registry.register(_Pool(slot))
        slot.when_filled(self._attach)

    def count_exchange(self, route: str, method: str, status: int) -> None:
        self._exchanges.labels(route, method, str(status)).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that `accept` prefers, and its content type."""
        encode: Callable[[CollectorRegistry], bytes]
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _attach(self, engine: LiveEngine) -> None:
        card = engine.intake.card
        self._sizes = frozenset((*card.sizes, *engine.intake.shapes))
        self._model.info({"model": card.name, "dtype": card.dtype, "fingerprint": card.fingerprint})
        engine.subscribe(self._count)

    def _count(self, outcome: Outcome) -> None:
        shape = outcome.request.shape
        size = str(shape) if shape in self._sizes else "other"
        self._requests.labels(outcome.status.value, size).inc()
        for run in outcome.runs:
            task = run.task
            self._rank_seconds.labels(task.stage.value).inc((run.end_s - run.start_s) * task.degree)
            if task.stage is Stage.DENOISE:
                self._steps.labels(str(task.degree)).inc(task.num_steps)
        if outcome.status is Status.CANCELLED:
            return
        (self._attained if outcome.is_attained else self._missed).labels(size).inc()
        if outcome.status is Status.FINISHED:
            self._latency.labels(size).observe(outcome.latency_s)
            self._queued.labels(size).observe(max(0.0, outcome.queued_s))
            self._slack.labels(size).observe(outcome.request.deadline_s - outcome.finish_s)


class _Pool(Collector):
    """Gauges read off the engine's state when Prometheus asks."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot

    def collect(self) -> Iterable[Metric]:
        is_ready = self._slot.unready_reason is None
        yield GaugeMetricFamily("tetriserve_ready", "Whether requests are admitted and run.", float(is_ready))
        if self._slot.engine is None:
            return
        state = self._slot.engine.state
        num_waiting = len(state.waiting)
        num_running = len(state.trajectories) - num_waiting
        num_busy = len(state.ranks) - len(state.idle_ranks)
        yield GaugeMetricFamily("tetriserve_requests_waiting", "Images that no rank works for.", num_waiting)
        yield GaugeMetricFamily("tetriserve_requests_running", "Images that ranks work for.", num_running)
        yield GaugeMetricFamily("tetriserve_ranks_up", "Living ranks.", len(state.ranks))
        yield GaugeMetricFamily("tetriserve_ranks_busy", "Living ranks that work.", num_busy)
