"""What became of one request, seen from the client."""

from __future__ import annotations

from dataclasses import dataclass

from tetriserve.workload.outcome import Outcome

_ONLY_THE_SERVER_KNOWS = ("predicted_finish_s", "queued_s", "gpu_time_s", "degrees", "ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An outcome by the client's clock: seconds since the run began, network included.

    Arrival is when the request was due, so a late send does not shorten its latency. `outcome.runs` are those that the
    answer tells, counted from `sent_s`; none from a peer.

    error: what kept the request from finishing: `refused`, `network`, `closed`, `timeout`, `bad_answer`, or
        `http_` and a status; None for one that finished or was cancelled.
    """

    outcome: Outcome
    sent_s: float
    error: str | None = None

    @property
    def lateness_s(self) -> float:
        """Seconds from when the request was due to when sending began."""
        return self.sent_s - self.outcome.request.arrival_s

    def as_json(self) -> dict[str, object]:
        """One line of a result file: an outcome's fields without those that are not known, and the client's own."""
        line = self.outcome.as_json()
        unknown = () if self.outcome.runs else _ONLY_THE_SERVER_KNOWS
        if not self.outcome.request.num_steps:
            unknown = (*unknown, "num_steps")
        return {key: value for key, value in line.items() if key not in unknown} | {
            "sent_s": self.sent_s,
            "error": self.error,
        }
