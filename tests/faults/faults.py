"""What goes wrong, when, and where it aims: drawn from one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Kind(StrEnum):
    KILL = "kill"
    """SIGKILL."""
    STOP = "stop"
    """SIGSTOP for good: a hang."""
    SLOW = "slow"
    """Stopped and continued, again and again, for a while."""
    STARVE = "starve"
    """No more address space for a while."""
    LEAVE = "client leaves"
    GARBAGE = "garbage"
    FLOOD = "flood"


class Aim(StrEnum):
    """What the worker that is struck shall be doing."""

    ANY = "anything"
    ENCODE = "encode"
    COLLECTIVE = "a collective"
    HANDOVER = "a hand-over"
    DECODE = "decode"
    START = "its start"
    """The replacement of a worker that was killed just before."""
    BESIDE = "another's start"
    """While a replacement of another rank starts."""
    GROUP = "a collective, two ranks"
    """Two ranks of one group at once."""
    POOL = "anything, all ranks"
    FORK_SERVER = "fork server"
    """The process that replacements are forked from, and then a worker."""


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float
    kind: Kind
    aim: Aim = Aim.ANY

    @property
    def is_strike(self) -> bool:
        """Whether a worker suffers it."""
        return self.kind in (Kind.KILL, Kind.STOP, Kind.SLOW, Kind.STARVE)


_AIMS = {
    Aim.ANY: 30, Aim.ENCODE: 10, Aim.COLLECTIVE: 18, Aim.HANDOVER: 12, Aim.DECODE: 12, Aim.START: 6, Aim.BESIDE: 5,
    Aim.GROUP: 4, Aim.POOL: 1, Aim.FORK_SERVER: 1,
}  # fmt: skip
_STOP_AIMS = {Aim.ANY: 4, Aim.COLLECTIVE: 3, Aim.HANDOVER: 2, Aim.DECODE: 2}
_STOP_SHARE = 0.2
_OTHERS = {Kind.SLOW: 0.1, Kind.STARVE: 0.12, Kind.LEAVE: 0.4, Kind.GARBAGE: 0.3, Kind.FLOOD: 0.03}
"""For each of those that count."""


def draw_faults(random: Random, duration_s: float, num_strikes: int) -> list[Fault]:
    """`num_strikes` kills and stops, and some of everything else, at random moments of `duration_s`."""
    faults = [Fault(random.uniform(0, duration_s), kind, aim) for kind, aim in _strikes(random, num_strikes)]
    for kind, share in _OTHERS.items():
        faults += [Fault(random.uniform(0, duration_s), kind) for _ in range(max(1, round(share * num_strikes)))]
    return sorted(faults, key=lambda fault: fault.at_s)


def _strikes(random: Random, num_strikes: int) -> Iterator[tuple[Kind, Aim]]:
    """Every aim at least once."""
    yield Kind.STOP, Aim.COLLECTIVE
    for aim in list(Aim)[: num_strikes - 1]:
        yield Kind.KILL, aim
    for _ in range(num_strikes - 1 - len(Aim)):
        is_stop = random.random() < _STOP_SHARE
        aims = _STOP_AIMS if is_stop else _AIMS
        yield Kind.STOP if is_stop else Kind.KILL, random.choices(list(aims), list(aims.values()))[0]
