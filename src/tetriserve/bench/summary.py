"""A run in numbers, under the names that the peers' diffusion benches use (vLLM-Omni, SGLang)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tetriserve.bench.attempt import Attempt
from tetriserve.bench.session import Measurement, Session
from tetriserve.core.request import Shape
from tetriserve.workload.outcome import Outcome, Status
from tetriserve.workload.percentiles import percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Seconds from when requests were due to their pictures, of those that finished; NaN where none did."""

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Latencies:
        ordered = sorted(outcome.latency_s for outcome in outcomes if outcome.status is Status.FINISHED)
        return cls(
            mean_s=statistics.fmean(ordered) if ordered else math.nan,
            p50_s=percentile(ordered, 50),
            p95_s=percentile(ordered, 95),
            p99_s=percentile(ordered, 99),
        )

    def as_json(self) -> dict[str, object]:
        return {
            "latency_mean": _finite(self.mean_s),
            "latency_median": _finite(self.p50_s),
            "latency_p50": _finite(self.p50_s),
            "latency_p95": _finite(self.p95_s),
            "latency_p99": _finite(self.p99_s),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """Requests of one size, or all. Failed ones count as missed."""

    num_judged: int
    num_finished: int
    num_failed: int
    num_attained: int
    latencies: Latencies

    @classmethod
    def of(cls, attempts: Sequence[Attempt]) -> GroupSummary:
        outcomes = [attempt.outcome for attempt in attempts]
        return cls(
            num_judged=len(outcomes),
            num_finished=sum(outcome.status is Status.FINISHED for outcome in outcomes),
            num_failed=sum(outcome.status is Status.FAILED for outcome in outcomes),
            num_attained=sum(outcome.is_attained for outcome in outcomes),
            latencies=Latencies.of(outcomes),
        )

    @property
    def sar(self) -> float:
        return self.num_attained / self.num_judged if self.num_judged else math.nan

    def as_json(self) -> dict[str, object]:
        return {
            "completed_requests": self.num_finished,
            "failed_requests": self.num_failed,
            "slo_met_success": self.num_attained,
            "slo_attainment_rate": _finite(self.sar),
            **self.latencies.as_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of error: how often, and what the first one said."""

    count: int
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All numbers of one measurement.

    num_left_out: requests that an interrupt cut short before their deadlines: neither attained nor missed.
    lateness_...: seconds from when requests were due to when sending began.
    cpu_share: of one core, what the bench itself used.
    """

    everything: GroupSummary
    by_shape: Mapping[Shape, GroupSummary]
    errors: Mapping[str, Fault]
    num_left_out: int
    duration_s: float
    lateness_p50_s: float
    lateness_p99_s: float
    lateness_max_s: float
    cpu_share: float

    @property
    def throughput_per_s(self) -> float:
        return self.everything.num_finished / self.duration_s if self.duration_s else 0.0


def summarise(measurement: Measurement) -> Summary:
    """Judge every attempt by the client's clock."""
    judged = judged_attempts(measurement)
    lateness = sorted(a.lateness_s for a in measurement.attempts if a.outcome.status is not Status.CANCELLED)
    shapes = sorted({a.outcome.request.shape for a in judged}, key=lambda shape: (shape.num_pixels, shape))
    errors: dict[str, Fault] = {}
    for attempt in judged:
        if attempt.error is not None:
            known = errors.get(attempt.error, Fault(count=0, example=attempt.outcome.message))
            errors[attempt.error] = Fault(count=known.count + 1, example=known.example)
    return Summary(
        everything=GroupSummary.of(judged),
        by_shape={shape: GroupSummary.of([a for a in judged if a.outcome.request.shape == shape]) for shape in shapes},
        errors=errors,
        num_left_out=len(measurement.attempts) - len(judged),
        duration_s=measurement.duration_s,
        lateness_p50_s=percentile(lateness, 50),
        lateness_p99_s=percentile(lateness, 99),
        lateness_max_s=percentile(lateness, 100),
        cpu_share=measurement.cpu_s / measurement.duration_s if measurement.duration_s else 0.0,
    )


def judged_attempts(measurement: Measurement) -> list[Attempt]:
    """All but those that were cut short before their deadlines, in order of arrival."""
    judged = [
        attempt
        for attempt in measurement.attempts
        if attempt.outcome.status is not Status.CANCELLED
        or attempt.outcome.request.deadline_s <= attempt.outcome.finish_s
    ]
    return sorted(judged, key=lambda attempt: attempt.outcome.request.arrival_s)


def summary_json(summary: Summary, session: Session, measurement: Measurement) -> dict[str, object]:
    """The result file. Times are seconds, rates are per second."""
    load = session.load
    is_random = load.trace is None
    return {
        "backend": "openai",
        "base_url": str(session.address),
        "model": measurement.target.model,
        "policy": measurement.target.policy,
        "dataset": "random" if is_random else "trace",
        "task": "t2i",
        "num_prompts": measurement.total,
        "request_rate": _finite(load.rate_per_min / 60) if is_random else None,
        "arrivals": load.arrivals if is_random else None,
        "max_concurrency": session.max_concurrency,
        "seed": load.seed,
        "slo_scale": load.slo_scale if load.slo_multiple is None else load.slo_multiple,
        "duration": summary.duration_s,
        "interrupted": measurement.is_interrupted,
        "left_out_requests": summary.num_left_out,
        "throughput_qps": summary.throughput_per_s,
        **summary.everything.as_json(),
        "errors": {kind: {"count": fault.count, "example": fault.example} for kind, fault in summary.errors.items()},
        "send_lateness_p50": _finite(summary.lateness_p50_s),
        "send_lateness_p99": _finite(summary.lateness_p99_s),
        "send_lateness_max": _finite(summary.lateness_max_s),
        "client_cpu_share": summary.cpu_share,
        "by_size": {str(shape): group.as_json() for shape, group in summary.by_shape.items()},
        "requests": [attempt.as_json() for attempt in judged_attempts(measurement)],
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
