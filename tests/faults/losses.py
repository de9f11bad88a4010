"""From strikes, log and feed to figures: how quickly losses were noticed, and what they cost."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tests.faults.faults import Kind
from tests.faults.feed import Feed, Task
from tests.faults.marksman import Hold, Marksman, Strike
from tests.faults.server import HEARTBEAT_TIMEOUT_S, Server

_LOST = re.compile(r"lost rank (\d+): (.*)|rank (\d+) could not be started again: (.*)")
_MAX_NOTICE_S = {Kind.KILL: 30.0, Kind.STOP: 30.0, Kind.STARVE: 10.0, Kind.SLOW: 10.0}
"""Later than this, a loss is not taken for the strike's."""
_MAX_OVER_S = 12.0
_AROUND_S = 0.1
"""The feed tells of a rank that joined a moment later."""
_FORK_SERVER_START_S = 15.0
"""It has to import torch and diffusers: 5 s on an idle machine, three times that on a busy one."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The server's word that a rank is gone. Times are seconds since the epoch."""

    rank: int
    time_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A task that failed with a worker, and the task that did it again."""

    failed: Task
    again: Task
    expected_s: float
    notice_s: float
    """How long the loss may take to be noticed."""
    num_idle: int
    """Ranks that lived and had nothing to do when the failed task was over."""
    num_overtaking: int
    """Tasks that started while it waited, and were not lost ones themselves."""

    @property
    def extra_s(self) -> float:
        """From the start of the one to the start of the other: what the request lost."""
        return self.again.start_s - self.failed.start_s

    @property
    def wait_s(self) -> float:
        """Of which it waited for ranks."""
        return self.again.start_s - self.failed.end_s

    @property
    def failing_s(self) -> float:
        """Of which the lost task took, beyond its expected length and the time to notice."""
        return self.failed.end_s - self.failed.start_s - self.expected_s - self.notice_s

    @property
    def excess_s(self) -> float:
        """Beyond the expected length of one task and the time to notice."""
        return self.extra_s - self.expected_s - self.notice_s


@dataclass
class Damage:
    """
    noticed_s: seconds from a strike to the server's word of the loss, by kind. A worker that is stopped while it starts
        holds up nobody, and may say nothing for longer: these are in starting_noticed_s.
    hit_stages: struck workers by what the server had them do.
    over_s: from a loss until the task that it cost is over for all its ranks.
    back_s: from a loss until the rank is up again; useful_s: until its first task starts. Those who had to wait for a
        fork server to start are counted apart, in late_back_s.
    hits: tasks that were lost, with what followed; held_up: those of them that the campaign had slowed down before.
    in_a_row: requests by the most losses in a row of any of theirs.
    overlaps: pairs of tasks of one request, or on one rank, that ran at once.
    """

    noticed_s: defaultdict[Kind, list[float]] = field(default_factory=lambda: defaultdict(list))
    starting_noticed_s: list[float] = field(default_factory=list)
    hit_stages: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    hits: list[Hit] = field(default_factory=list)
    held_up: list[Hit] = field(default_factory=list)
    over_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    late_back_s: list[float] = field(default_factory=list)
    useful_s: list[float] = field(default_factory=list)
    in_a_row: Counter[int] = field(default_factory=Counter)
    overlaps: list[tuple[Task, Task]] = field(default_factory=list)
    unnoticed: list[Strike] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)


def assess(server: Server, feed: Feed, marksman: Marksman) -> Damage:
    damage = Damage(losses=_losses(server))
    _match_strikes(damage, feed, marksman.strikes)
    _find_hits(damage, feed, marksman.holds)
    _find_returns(damage, feed, marksman.fork_server_deaths_s)
    _find_overlaps(damage, feed)
    damage.in_a_row = _losses_in_a_row(feed)
    return damage


def _losses(server: Server) -> list[Loss]:
    found = []
    for time_s, line in server.log_lines():
        match = _LOST.match(line["message"])
        if match:
            found.append(Loss(int(match[1] or match[3]), time_s, match[2] or match[4]))
    return found


def _match_strikes(damage: Damage, feed: Feed, strikes: Sequence[Strike]) -> None:
    """A loss is noticed from the first kill on that the worker suffered, or else from the first of anything."""
    failed = [task for task in feed.ran if task.failure is not None]
    unmatched = list(strikes)
    for loss in damage.losses:
        causes = [
            strike
            for strike in unmatched
            if strike.rank == loss.rank and -0.002 <= loss.time_s - strike.time_s <= _MAX_NOTICE_S[strike.kind]
        ]
        if not causes:
            damage.hit_stages["(nobody's)", loss.reason[:60], ""] += 1
            continue
        deadly = [strike for strike in causes if strike.kind is Kind.KILL] or causes
        cause = deadly[0]
        unmatched = [strike for strike in unmatched if strike not in causes]
        if cause.kind is Kind.STOP and not cause.is_up:
            damage.starting_noticed_s.append(loss.time_s - cause.time_s)
        else:
            damage.noticed_s[cause.kind].append(loss.time_s - cause.time_s)
        stage, end_s = _task_at(failed, feed, loss, cause)
        if end_s is not None:
            damage.over_s.append(end_s - loss.time_s)
        damage.hit_stages[cause.kind.value, cause.aim.value, stage] += 1
    damage.unnoticed = [strike for strike in unmatched if strike.kind in (Kind.KILL, Kind.STOP)]


def _task_at(failed: Sequence[Task], feed: Feed, loss: Loss, strike: Strike) -> tuple[str, float | None]:
    """What the rank was doing when it was struck, by the task that failed with it, and when that was over."""
    struck_s = strike.time_s - feed.origin_s
    for task in failed:
        end_s = task.end_s + feed.origin_s
        if loss.rank in task.ranks and task.start_s - 0.05 <= struck_s and -0.1 < end_s - loss.time_s < _MAX_OVER_S:
            return f"{task.stage} at {len(task.ranks)}" if task.stage == "denoise" else task.stage, end_s
    return "no task", None


def _find_hits(damage: Damage, feed: Feed, holds: Sequence[Hold]) -> None:
    by_request: defaultdict[str, list[Task]] = defaultdict(list)
    for task in feed.ran:
        by_request[task.request_id].append(task)
    pairs: list[tuple[Task, Task]] = []
    for tasks in by_request.values():
        tasks.sort(key=lambda task: task.start_s)
        pairs += [
            (failed, again) for failed, again in zip(tasks, tasks[1:], strict=False) if failed.failure is not None
        ]
    repeats = {again.key for _, again in pairs}
    for failed, again in pairs:
        expected_s = feed.expected_s.get(failed.key, failed.end_s - failed.start_s)
        is_hang = failed.end_s - failed.start_s > HEARTBEAT_TIMEOUT_S - 1
        notice_s = HEARTBEAT_TIMEOUT_S * 1.2 if is_hang else 0.1
        idle = _idle_ranks(failed.end_s, again, repeats, damage.losses, feed)
        overtaking = [
            task for task in feed.ran if failed.end_s < task.start_s < again.start_s and task.key not in repeats
        ]
        hit = Hit(failed, again, expected_s, notice_s, len(idle), len(overtaking))
        (damage.held_up if any(_is_held_up(failed, hold, feed) for hold in holds) else damage.hits).append(hit)


def _idle_ranks(
    at_s: float, again: Task, repeats: Collection[tuple[str, float]], losses: Sequence[Loss], feed: Feed
) -> set[int]:
    """Those that `again` could have had at `at_s`, by the engine's clock; none that came or went around then.

    repeats: keys of lost tasks that were done again, which may go before this one.
    """
    time_s = at_s + feed.origin_s
    busy = {
        rank
        for task in feed.ran
        if task.start_s < at_s < task.end_s or (task.start_s == at_s and task is not again and task.key in repeats)
        for rank in task.ranks
    }
    away = {
        loss.rank
        for loss in losses
        if loss.time_s - _AROUND_S < time_s < feed.back_at(loss.rank, loss.time_s) + _AROUND_S
    }
    return {rank for task in feed.ran for rank in task.ranks} - busy - away


def _is_held_up(task: Task, hold: Hold, feed: Feed) -> bool:
    start_s, end_s = task.start_s + feed.origin_s, task.end_s + feed.origin_s
    return hold.rank in task.ranks and hold.start_s < end_s and start_s < hold.end_s


def _find_returns(damage: Damage, feed: Feed, fork_server_deaths_s: Sequence[float]) -> None:
    """Of losses after which the rank came back and worked before it was lost again."""
    finished = sorted((task for task in feed.ran if task.failure is None), key=lambda task: task.end_s)
    for number, loss in enumerate(damage.losses):
        later = [other.time_s for other in damage.losses[number + 1 :] if other.rank == loss.rank]
        until_s = min(later, default=float("inf"))
        joined = feed.back_at(loss.rank, loss.time_s)
        if not joined < until_s:
            continue
        if any(
            -_FORK_SERVER_START_S < death_s - loss.time_s < joined - loss.time_s for death_s in fork_server_deaths_s
        ):
            damage.late_back_s.append(joined - loss.time_s)
            continue
        damage.back_s.append(joined - loss.time_s)
        useful = (
            task.start_s + feed.origin_s
            for task in finished
            if loss.rank in task.ranks and joined - 0.2 < task.start_s + feed.origin_s < until_s
        )
        first = next(useful, None)
        if first is not None:
            damage.useful_s.append(first - loss.time_s)


def _find_overlaps(damage: Damage, feed: Feed) -> None:
    spans: defaultdict[object, list[Task]] = defaultdict(list)
    for task in feed.ran:
        for who in (task.request_id, *task.ranks):
            spans[who].append(task)
    for tasks in spans.values():
        tasks.sort(key=lambda task: (task.start_s, task.end_s))
        damage.overlaps += [
            (one, two) for one, two in zip(tasks, tasks[1:], strict=False) if two.start_s < one.end_s - 0.0002
        ]


def _losses_in_a_row(feed: Feed) -> Counter[int]:
    most: Counter[str] = Counter()
    now: Counter[str] = Counter()
    for task in feed.ran:
        now[task.request_id] = 0 if task.failure is None else now[task.request_id] + 1
        most[task.request_id] = max(most[task.request_id], now[task.request_id])
    return Counter(most.values())
