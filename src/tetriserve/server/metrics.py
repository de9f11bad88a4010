"""Prometheus metrics of one app, in a registry of their own. docs/observability.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.exposition import choose_encoder

from tetriserve.core.events import Event, Submitted, WorkerJoined, WorkerLost
from tetriserve.core.request import Request, Shape
from tetriserve.engine import EndedTask, LiveEngine, Observation, Occurred
from tetriserve.engine.models import ServedModels
from tetriserve.server.durability import JournalCollector
from tetriserve.server.occupancy import PoolCollector
from tetriserve.server.slot import EngineSlot
from tetriserve.workload.outcome import Outcome, Status

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
_SIGNED_SECONDS = (*(-seconds for seconds in reversed(_SECONDS)), 0.0, *_SECONDS)
_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 5.0)
_REFUSALS = frozenset({401, 429, 503})


class Metrics:
    """Counts what the slot's engine does from the moment it is there, and HTTP exchanges from the start.

    Labels are bounded, because they live for ever and clients choose sizes: one outside the model's sizes and the
    profile is "other". Models are labelled by their names, of which there are as many as models.
    """

    def __init__(self, slot: EngineSlot) -> None:
        self._registry = CollectorRegistry()
        self._models: ServedModels | None = None
        self._sizes: dict[str, frozenset[Shape]] = {}
        self._promised: set[str] = set()  # unfinished requests that were admitted on a promise
        self._declare_http()
        self._declare_requests()
        self._declare_tasks()
        self._model = Info("tetriserve_model", "A served model.", ("model",), registry=self._registry)
        Info("tetriserve_build", "This server.", registry=self._registry).info({"version": version("tetriserve")})
        self._registry.register(PoolCollector(slot))
        self._registry.register(JournalCollector(slot))
        slot.when_filled(self._attach)

    def count_exchange(self, route: str, method: str, status: int, error_code: str | None) -> None:
        self._exchanges.labels(route, method, str(status)).inc()
        if status in _REFUSALS and error_code is not None:
            self._refusals.labels(error_code).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that `accept` prefers, and its content type."""
        encode: Callable[[CollectorRegistry], bytes]
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _declare_http(self) -> None:
        self._exchanges = self._counter("http_requests", "HTTP requests.", "route", "method", "status")
        self._refusals = self._counter("http_requests_rejected", "HTTP requests answered 401, 429 or 503.", "code")

    def _declare_requests(self) -> None:
        of = ("model", "size")
        self._admitted = self._counter("requests_admitted", "Images admitted.", *of)
        self._requests = self._counter("requests", "Images by end.", *of, "status")
        self._attained = self._counter("requests_attained", "Images finished by their deadline.", *of)
        self._missed = self._counter("requests_missed", "Images that failed or finished late.", *of)
        self._latency = self._histogram(
            "request_latency_seconds", "Arrival to finish of finished images.", _SECONDS, *of
        )
        self._queued = self._histogram(
            "request_queued_seconds", "Time in which no rank worked for a finished image.", _SECONDS, *of
        )
        self._stage_time = self._histogram(
            "request_stage_seconds", "Time of a finished image's tasks, by stage.", _SECONDS, "model", "stage"
        )
        self._slack = self._histogram(
            "deadline_slack_seconds",
            "Deadline minus finish of finished images; negative is late.",
            _SIGNED_SECONDS,
            *of,
        )
        self._finish_error = self._histogram(
            "finish_error_seconds",
            "Finish minus the finish predicted at admission, of finished images; positive is later than predicted.",
            _SIGNED_SECONDS,
            *of,
        )
        self._promises = self._counter(
            "promises", "Images admitted on the promise of their deadline: kept or broken.", *of, "end"
        )
        self._switches = self._counter(
            "group_switches", "Denoise tasks on other ranks than the image's one before.", "model"
        )

    def _declare_tasks(self) -> None:
        self._tasks = self._counter(
            "tasks",
            "Tasks by end: finished, step (it failed), memory (ran out), lost (with a worker).",
            "model",
            "stage",
            "end",
        )
        self._steps = self._counter(
            "steps", "Denoise steps by degree; one that images share counts for each.", "model", "degree"
        )
        self._batch = self._histogram("task_batch", "Images that a denoise task was for.", _BATCHES, "model")
        self._rank_seconds = self._counter("rank_seconds", "Rank time of ended tasks by stage.", "model", "stage")
        self._step_ratio = self._histogram(
            "step_time_ratio",
            "Step time of a denoise task over what the scheduler expected.",
            _RATIOS,
            "model",
            "degree",
        )
        self._workers_lost = self._counter("workers_lost", "Workers that died or were killed because they hung.")
        self._workers_restarted = self._counter("workers_restarted", "Workers that took the place of lost ones.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tetriserve_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"tetriserve_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _attach(self, engine: LiveEngine) -> None:
        self._models = engine.models
        for intake in engine.models.intakes:
            card = intake.card
            self._sizes[card.name] = frozenset((*card.sizes, *intake.shapes))
            self._model.labels(card.name).info({"dtype": card.execution.dtype, "fingerprint": card.fingerprint})
            for alone in (self._switches, self._batch):  # they are there from the start: no other label is to come
                alone.labels(card.name)
        for request in engine.open_requests:  # of an earlier life, taken up before anyone listened
            self._admitted.labels(*self._of(request)).inc()
        engine.subscribe(self._observe)

    def _observe(self, observation: Observation) -> None:
        match observation:
            case Occurred(event):
                self._count_event(event)
            case EndedTask():
                self._count_task(observation)
            case Outcome():
                self._count_outcome(observation)

    def _count_outcome(self, outcome: Outcome) -> None:
        model, size = self._of(outcome.request)
        self._requests.labels(model, size, outcome.status.value).inc()
        was_promised = outcome.request.request_id in self._promised
        self._promised.discard(outcome.request.request_id)
        denoise = [run.task for run in outcome.runs if run.task.num_steps]
        num_switches = sum(set(before.ranks) != set(after.ranks) for before, after in pairwise(denoise))
        self._switches.labels(model).inc(num_switches)
        if outcome.status is Status.CANCELLED:
            return
        # Both exist from a size's first image on, so that a size of which all are missed has a SAR, of 0.
        attained, missed = self._attained.labels(model, size), self._missed.labels(model, size)
        (attained if outcome.is_attained else missed).inc()
        if was_promised:
            self._promises.labels(model, size, "kept" if outcome.is_attained else "broken").inc()
        if outcome.status is Status.FINISHED:
            self._observe_finished(outcome, model, size)

    def _of(self, request: Request) -> tuple[str, str]:
        """Model and size of a request, as labels."""
        name = self._name_of(request)
        return name, str(request.shape) if request.shape in self._sizes[name] else "other"

    def _name_of(self, request: Request) -> str:
        assert self._models is not None, "requests come to an engine"
        return self._models.of(request).card.name

    def _observe_finished(self, outcome: Outcome, model: str, size: str) -> None:
        self._latency.labels(model, size).observe(outcome.latency_s)
        self._queued.labels(model, size).observe(max(0.0, outcome.queued_s))
        self._slack.labels(model, size).observe(outcome.request.deadline_s - outcome.finish_s)
        self._finish_error.labels(model, size).observe(outcome.finish_s - outcome.predicted_finish_s)
        for stage in dict.fromkeys(stage.kind for stage in outcome.request.stages):
            stage_s = sum(run.end_s - run.start_s for run in outcome.runs if run.task.stage == stage)
            self._stage_time.labels(model, stage).observe(stage_s)

    def _count_task(self, ended: EndedTask) -> None:
        run, task = ended.run, ended.run.task
        model = self._name_of(ended.work[0].request)
        end = "finished" if ended.failure is None else ended.failure.value
        self._tasks.labels(model, task.stage, end).inc()
        self._rank_seconds.labels(model, task.stage).inc((run.end_s - run.start_s) * task.degree)
        if ended.step_s is not None and ended.expected_step_s is not None:
            self._steps.labels(model, str(task.degree)).inc(task.num_steps * task.batch)
            self._batch.labels(model).observe(task.batch)
            self._step_ratio.labels(model, str(task.degree)).observe(ended.step_s / ended.expected_step_s)

    def _count_event(self, event: Event) -> None:
        match event:
            case Submitted(request, promised_finish_s):
                self._admitted.labels(*self._of(request)).inc()
                if promised_finish_s is not None:
                    self._promised.add(request.request_id)
            case WorkerLost():
                self._workers_lost.inc()
            case WorkerJoined():  # those of the start came before anyone listened
                self._workers_restarted.inc()
