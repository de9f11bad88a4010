"""What the journal holds and has done, read when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tetriserve.engine import JournalledJobs
from tetriserve.server.slot import EngineSlot

_STATES = ("open", "finished", "failed")
_KINDS = ("record", "file", "database", "commit")


class JournalCollector(Collector):
    """Metrics of the journal of the slot's jobs; all are 0 where there is none."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot

    def collect(self) -> Iterator[Metric]:
        jobs = self._slot.jobs
        durable = jobs if isinstance(jobs, JournalledJobs) else None
        entries = GaugeMetricFamily("tetriserve_journal_entries", "Idempotency keys by state.", labels=["state"])
        counts = None if durable is None else durable.count()
        for state in _STATES:
            entries.add_metric([state], 0 if counts is None else counts[state])
        yield entries
        corrupt = CounterMetricFamily("tetriserve_journal_corrupt", "What was not as it was written.", labels=["kind"])
        for kind in _KINDS:
            corrupt.add_metric([kind], 0 if durable is None else durable.journal.corrupt[kind])
        yield corrupt
        for name, text, value in (
            ("resumed", "Images taken up from an earlier life.", durable and durable.num_resumed),
            ("steps_saved", "Steps of these that were not done again.", durable and durable.num_steps_saved),
            ("replays", "Calls answered from the journal.", durable and durable.num_replayed),
            ("errors", "Reads and writes that failed.", durable and durable.journal.num_errors),
        ):
            yield CounterMetricFamily(f"tetriserve_journal_{name}", text, value or 0)
