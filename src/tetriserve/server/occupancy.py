"""What the ranks do with their time, read off the engine's states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tetriserve.core.plan import State
from tetriserve.engine import LiveEngine, Observation, Occurred
from tetriserve.server.slot import EngineSlot


class RankTime:
    """Seconds that ranks worked and idled. The state changes only at events, so it is enough to look at each.

    busy_s: by rank.
    idle_waiting_s: rank-seconds idle while an image waited: what a schedule leaves on the table.
    idle_empty_s: rank-seconds idle while none did.
    """

    def __init__(self, now: float) -> None:
        self.busy_s: defaultdict[int, float] = defaultdict(float)
        self.idle_waiting_s = 0.0
        self.idle_empty_s = 0.0
        self._looked_at = now

    def advance(self, state: State, now: float) -> None:
        """Book the time since the last look, all of which `state` lasted."""
        elapsed_s, self._looked_at = now - self._looked_at, now
        for flight in state.in_flight:
            for rank in flight.task.ranks:
                self.busy_s[rank] += elapsed_s
        idle_s = len(state.idle_ranks) * elapsed_s
        if idle_s and any(not trajectory.is_running for trajectory in state.trajectories):
            self.idle_waiting_s += idle_s
        else:
            self.idle_empty_s += idle_s


class PoolCollector(Collector):
    """Metrics of the engine in `slot`, read when Prometheus asks."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot
        self._rank_time = RankTime(0.0)
        slot.when_filled(self._attach)

    def collect(self) -> Iterator[Metric]:
        is_ready = self._slot.unready_reason is None
        yield GaugeMetricFamily("tetriserve_ready", "Whether requests are admitted and run.", float(is_ready))
        engine = self._slot.engine
        if engine is not None:
            yield GaugeMetricFamily(
                "tetriserve_requests_open", "Images admitted and not ended.", len(engine.open_requests)
            )
            yield CounterMetricFamily(
                "tetriserve_observer_errors",
                "Errors in metrics, traces, board or journal as they observed the engine.",
                engine.num_observer_errors,
            )
            yield from _gauges(engine.state)
            self._rank_time.advance(engine.state, engine.now)
            yield from self._times()

    def _attach(self, engine: LiveEngine) -> None:
        self._rank_time = RankTime(engine.now)

        def observe(observation: Observation) -> None:
            if isinstance(observation, Occurred):
                self._rank_time.advance(engine.state, observation.now)

        engine.subscribe(observe)

    def _times(self) -> Iterator[Metric]:
        busy = CounterMetricFamily("tetriserve_rank_busy_seconds", "Time that a rank worked.", labels=["rank"])
        for rank, busy_s in sorted(self._rank_time.busy_s.items()):
            busy.add_metric([str(rank)], busy_s)
        yield busy
        idle = CounterMetricFamily(
            "tetriserve_rank_idle_seconds", "Rank time without work, by whether an image waited.", labels=["queue"]
        )
        idle.add_metric(["waiting"], self._rank_time.idle_waiting_s)
        idle.add_metric(["empty"], self._rank_time.idle_empty_s)
        yield idle


def _gauges(state: State) -> Iterable[Metric]:
    num_waiting = len(state.waiting)
    num_running = len(state.trajectories) - num_waiting
    num_busy = len(state.ranks) - len(state.idle_ranks)
    yield GaugeMetricFamily("tetriserve_requests_waiting", "Images that no rank works for.", num_waiting)
    yield GaugeMetricFamily("tetriserve_requests_running", "Images that ranks work for.", num_running)
    yield GaugeMetricFamily("tetriserve_ranks_up", "Living ranks.", len(state.ranks))
    yield GaugeMetricFamily("tetriserve_ranks_busy", "Living ranks that work.", num_busy)
