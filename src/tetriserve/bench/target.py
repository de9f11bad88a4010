"""The server under test."""

from __future__ import annotations

from dataclasses import dataclass

from tetriserve.core.request import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is known of it before it is measured. A peer's `/v1/models` has less to say than TetriServe's.

    model: the name sent with requests; None sends none.
    num_steps: of a request that names none; None if unknown.
    """

    model: str | None = None
    shapes: tuple[Shape, ...] = ()
    num_steps: int | None = None
    num_ranks: int | None = None
    policy: str | None = None
