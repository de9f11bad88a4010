"""What is known of a run while it goes on."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field

from tetriserve.bench.attempt import Attempt
from tetriserve.workload.outcome import Status


@dataclass(slots=True)
class Tally:
    """Counts and latencies up to now.

    total: requests in the workload. num_sent: due and handed to sending. latencies_s: of finished requests, ascending.
    """

    total: int
    num_sent: int = 0
    num_attained: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def num_running(self) -> int:
        return self.num_sent - len(self.attempts)

    @property
    def num_failed(self) -> int:
        return self.errors.total()

    def take(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        match attempt.outcome.status:
            case Status.FINISHED:
                self.num_finished += 1
                self.num_attained += attempt.outcome.is_attained
                insort(self.latencies_s, attempt.outcome.latency_s)
            case Status.FAILED:
                self.errors[attempt.error or ""] += 1
            case Status.CANCELLED:
                self.num_cancelled += 1
