"""The numbers of a run, checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tetriserve.bench.address import Address
from tetriserve.bench.attempt import Attempt
from tetriserve.bench.load import Load
from tetriserve.bench.session import Measurement, Session
from tetriserve.bench.summary import summarise, summary_json
from tetriserve.bench.target import Target
from tetriserve.core.request import Shape
from tetriserve.report.bench_page import render_bench
from tetriserve.workload.outcome import Outcome, Status


@pytest.fixture
def attempt(make_request) -> Callable[..., Attempt]:
    def make(name, finish_s, status=Status.FINISHED, error=None, late_s=0.001, arrival_s=0.0, **fields) -> Attempt:
        request = make_request(name, arrival_s=arrival_s, slo_s=2.0, **fields)
        outcome = Outcome(
            request=request, status=status, runs=(), predicted_finish_s=math.nan, finish_s=finish_s, message=error or ""
        )
        return Attempt(outcome=outcome, sent_s=arrival_s + late_s, error=error)

    return make


def measured(attempts: list[Attempt], **fields) -> Measurement:
    known = {"target": Target(policy="lookahead"), "total": 9, "duration_s": 4.0, "cpu_s": 0.1, "is_interrupted": False}
    return Measurement(attempts=attempts, **(known | fields))


@pytest.fixture
def mixed(attempt) -> Measurement:
    return measured(
        [
            attempt("on-time", 1.0, shape=Shape(256, 256)),
            attempt("late", 3.0, late_s=0.004),
            attempt("next", 3.5, arrival_s=2.0),
            attempt("refused", 0.1, Status.FAILED, "http_429"),
            attempt("again", 0.2, Status.FAILED, "http_429"),
            attempt("gone", 0.2, Status.FAILED, "closed"),
        ]
    )


def test_failed_requests_count_as_missed_and_latency_is_of_the_finished(mixed: Measurement) -> None:
    summary = summarise(mixed)
    everything = summary.everything
    assert (everything.num_judged, everything.num_finished, everything.num_failed) == (6, 3, 3)
    assert everything.sar == pytest.approx(2 / 6)
    assert everything.latencies.mean_s == pytest.approx((1.0 + 3.0 + 1.5) / 3)
    assert everything.latencies.p50_s == 1.5
    assert everything.latencies.p99_s == pytest.approx(1.5 + 0.98 * 1.5)
    assert [str(shape) for shape in summary.by_shape] == ["256x256", "512x512"]
    assert summary.by_shape[Shape(256, 256)].sar == 1.0
    assert summary.by_shape[Shape(512, 512)].sar == pytest.approx(1 / 5)
    assert {kind: fault.count for kind, fault in summary.errors.items()} == {"http_429": 2, "closed": 1}
    assert summary.throughput_per_s == pytest.approx(3 / 4)
    assert summary.cpu_share == pytest.approx(0.025)
    assert summary.lateness_max_s == pytest.approx(0.004)


def test_an_interrupt_leaves_out_whom_it_cut_short_before_the_deadline(attempt) -> None:
    cut = [
        attempt("done", 1.0),
        attempt("overdue", 2.5, Status.CANCELLED, late_s=0.0),
        attempt("undecided", 2.5, Status.CANCELLED, arrival_s=1.0, late_s=0.0),
    ]
    summary = summarise(measured(cut, is_interrupted=True))
    assert (summary.everything.num_judged, summary.num_left_out) == (2, 1)
    assert summary.everything.sar == 0.5
    assert summary.lateness_p50_s == pytest.approx(0.001)


def test_the_result_file_has_the_peers_names(mixed: Measurement) -> None:
    session = Session(address=Address.parse("http://h:1"), load=Load(rate_per_min=90, slo_scale=1.5))
    document = summary_json(summarise(mixed), session, mixed)
    assert document["duration"] == 4.0
    assert (document["completed_requests"], document["failed_requests"]) == (3, 3)
    assert document["throughput_qps"] == pytest.approx(0.75)
    assert document["latency_median"] == document["latency_p50"] == 1.5
    assert {"latency_mean", "latency_p95", "latency_p99"} <= document.keys()
    assert (document["slo_met_success"], document["slo_scale"]) == (2, 1.5)
    assert document["slo_attainment_rate"] == pytest.approx(1 / 3)
    assert (document["backend"], document["dataset"], document["task"]) == ("openai", "random", "t2i")
    assert document["request_rate"] == 1.5
    assert [line["request_id"] for line in document["requests"]] == [
        "on-time", "late", "refused", "again", "gone", "next",
    ]  # fmt: skip


def test_a_run_of_which_nothing_came_back_has_no_latencies(attempt) -> None:
    nothing = measured([attempt("a", 0.1, Status.FAILED, "refused"), attempt("b", 0.1, Status.FAILED, "refused")])
    session = Session(address=Address.parse("http://h:1"), load=Load())
    summary = summarise(nothing)
    document = summary_json(summary, session, nothing)
    assert (document["slo_attainment_rate"], document["latency_p99"]) == (0.0, None)
    assert "<svg" in render_bench(session, nothing, summary, title="t", command="c")


def test_the_page_shows_sizes_requests_and_what_went_wrong(mixed: Measurement) -> None:
    session = Session(address=Address.parse("http://h:1"), load=Load())
    page = render_bench(session, mixed, summarise(mixed), title="flux at <h>", command="tetriserve bench")
    assert "flux at &lt;h&gt;" in page
    assert "2 x http_429" in page
    for name in ("sar", "requests", "latency", "sar-over-time"):
        assert f'<section id="{name}">' in page
    assert 'id="board"' not in page  # a peer says nothing of its ranks
    assert page.count('<td class="word">http_429</td>') == 2
