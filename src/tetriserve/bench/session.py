"""One run of the bench: what is to be done, and what was found. The doing is in `bench.run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tetriserve.bench.address import Address
from tetriserve.bench.attempt import Attempt
from tetriserve.bench.load import Load
from tetriserve.bench.target import Target
from tetriserve.core.bounds import MAX_REQUESTS, MAX_TIME_S, check_range
from tetriserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is to be done.

    is_checked: ask the server what it is before anything is sent.
    num_warm_ups: uncounted requests of each size, one at a time.
    max_concurrency: requests in flight at most; None is no cap.
    sends_slo, extra, images: as in `Wire`.
    """

    address: Address
    load: Load
    api_key: str | None = None
    model: str | None = None
    is_checked: bool = True
    num_warm_ups: int = 1
    max_concurrency: int | None = None
    timeout_s: float = 600.0
    sends_slo: bool = True
    extra: Mapping[str, object] = field(default_factory=dict)
    images: Path | None = None

    def __post_init__(self) -> None:
        check_range("warmup-requests", self.num_warm_ups, 0, MAX_REQUESTS)
        if self.load.slo_multiple is not None and not self.num_warm_ups:
            raise ConfigError("warmup-requests is 0 beside slo-multiple, which the warm-up measures; set at least 1")
        if self.max_concurrency is not None:
            check_range("max-concurrency", self.max_concurrency, 1, MAX_REQUESTS)
        check_range("timeout", self.timeout_s, 0.001, MAX_TIME_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was found.

    total: requests in the load, of which an interrupted session did not attempt all.
    duration_s: from the first request's due time to the end of the last attempt.
    cpu_s: this process' CPU time meanwhile.
    """

    target: Target
    attempts: Sequence[Attempt]
    total: int
    duration_s: float
    cpu_s: float
    is_interrupted: bool
