"""The round-based, deadline-aware scheduler of TetriServe (section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nsmallest
from itertools import chain, groupby
from operator import attrgetter
from typing import NamedTuple

from tetriserve.core.cluster import Role
from tetriserve.core.plan import CostModel, Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.batching import may_share, sizes_that_pay
from tetriserve.policies.degrees import EfficientDegree
from tetriserve.policies.overdue import IN_HAND_S, Need, have_slack, owed
from tetriserve.policies.packing import Option, OptionGroup, pack_round
from tetriserve.policies.room import Room
from tetriserve.policies.rounds import Round, RoundClock, Window
from tetriserve.policies.scale_up import Choice, scale_up
from tetriserve.policies.stages import place_short_stages
from tetriserve.policies.triage import Candidate, ShortStage, Sorter, Triage

NUM_PRICED = 4
"""Requests, least slack first, whose GPU time decides how long a round is."""

_EQUAL = 1.01
"""GPU times that differ by no more than this factor count as equal, and the longer round is taken."""


class TetriServe:
    """Rounds in which as many requests as possible keep their deadlines.

    A round spans some steps of a reference shape and ends when the last of its tasks with steps does. At every event
    the round's algorithm runs for the ranks that are idle, with the end of the round as horizon: when all are idle this
    is the paper's round, in between it fills what has become free. Tasks with steps end by the end of the round, so
    that all ranks meet there and wide groups can form; that, not any memory between calls, is what reserves 8 ranks for
    a request that needs them.

    Beyond the paper, a round that begins has the longest of `lengths_s` at which the most urgent requests need the
    least GPU time: a round that holds no whole number of steps at the degree that a request needs wastes the rest.

    In order: short stages as soon as a rank is free; requests that can still meet their deadlines, packed by
    Algorithm 1, one priority class after the other; those that it deferred, at any degree that fits (`fill`); late
    requests, which cannot meet their deadlines any more, as narrow as possible; and wider degrees for all of these
    while ranks are left (`scale_up`). Where requests are left over, those of one kind share tasks (section 5, selective
    batching), as far as nobody's deadline is compromised and it saves GPU time (`batching`). Beyond the paper, late
    requests come before the packing where that is owed to them or those in time have slack (`policies.overdue`).
    """

    def __init__(
        self,
        *,
        lengths_s: Sequence[float],
        placement: bool = True,
        scale_up: bool = True,
        fill: bool = True,
        batching: bool = True,
    ) -> None:
        """
        Args:
            lengths_s: what a round may last, longest first; only one fixes it.
            placement: keep requests on the ranks that hold their state.
            scale_up: widen tasks into ranks that would idle.
            fill: run requests that the packing deferred on ranks that would idle.
            batching: let requests of one kind share tasks.
        """
        self.batching = batching
        self.clock = RoundClock.of(lengths_s[0])
        self.shortest_s = lengths_s[-1]
        self.placement = placement
        self.scale_up = scale_up
        self.fill = fill
        self._sorters = tuple(Sorter(RoundClock.of(length_s)) for length_s in lengths_s)

    def plan(self, state: State, now: float) -> Plan:
        """See `Policy.plan`. Asks again at the end of the round for as long as a request waits."""
        if not state.waiting:
            return Plan()
        clock = self.clock
        this = clock.round_at(state.in_flight, now)
        room = Room.of(state)
        if not room.num_free:
            return Plan(wake_at=this.end_s)
        waiting = self._sorters[0].triage(state, now)
        if this.is_open:
            sorter = self._sorter_for(waiting.on_time, state, now)
            if sorter is not self._sorters[0]:
                clock = sorter.clock
                this = Round(this.start_s, this.start_s + clock.round_s, is_open=True)
                waiting = sorter.triage(state, now)
        window = Window(clock, this, now, state.cost.switch_s)
        team_s = state.cost.team_s
        started = _take_short(waiting.short, room, lambda stage, num_ranks: stage.pace(now, num_ranks))
        tasks = place_short_stages(
            [(trajectory, pace[0]) for trajectory, pace in started], room, team_s=team_s, preserve=self.placement
        )
        if (waiting.on_time or waiting.late) and _is_assembling(state, started, window):
            return Plan(tuple(tasks), wake_at=clock.grace_end_s(this))

        late_short, late_choices = _choose_ahead(waiting, state, room, window)
        choices = self._choose_on_time(_startable(waiting.on_time, window), room, window)
        served = {id(trajectory) for trajectory, _ in late_short} | {id(choice.trajectory) for choice in late_choices}
        late_short += _choose_late_short(
            [s for s in waiting.late_short if id(s.trajectory) not in served], room, window
        )
        late_choices += _choose_late([late for late in waiting.late if id(late.trajectory) not in served], room, window)
        if self.scale_up:
            choices = _widened(choices, room, window)
            late_choices = _widened(late_choices, room, window)

        shares = [TaskShare.of(choice) for choice in choices + late_choices]
        if self.batching and state.cost.max_batch > 1:
            shares = _share(shares, waiting, room, window, state.cost)
        wanted = [(share.members[0], share.degree) for share in shares]
        placed = room.place(wanted, team_s=team_s, preserve=self.placement)
        for share, ranks in zip(shares, placed, strict=True):
            names = tuple(trajectory.request_id for trajectory in share.members)
            tasks.append(Task(names, share.members[0].stage.kind, ranks, share.num_steps))
        tasks += place_short_stages(late_short, room, team_s=team_s, preserve=self.placement)
        return Plan(tuple(tasks), wake_at=this.end_s)

    def _sorter_for(self, on_time: Sequence[Candidate], state: State, now: float) -> Sorter:
        """The one with the longest of the rounds at which the most urgent of `on_time` need the least GPU time."""
        urgent = on_time[:NUM_PRICED]
        if len(self._sorters) == 1 or not urgent:
            return self._sorters[0]
        from_s = now + state.cost.switch_s
        needed = [sum(sorter.gpu_s(candidate, from_s, state) for candidate in urgent) for sorter in self._sorters]
        least = min(needed)
        return next(sorter for sorter, gpu_s in zip(self._sorters, needed, strict=True) if gpu_s <= _EQUAL * least)

    def _choose_on_time(self, on_time: Sequence[Candidate], room: Room, window: Window) -> list[Choice]:
        """Algorithm 1, one priority class after the other; then what it deferred, least slack first."""
        chosen: list[Choice] = []
        deferred: list[Candidate] = []
        for _, members in groupby(on_time, key=attrgetter("priority")):
            able = list(members)
            if room.is_limited:
                able = [candidate for candidate in able if room.free_for(candidate.trajectory)]
            if not able:
                continue
            packed, left = pack_candidates(able, room.within(one.trajectory for one in able), window)
            for choice in packed:
                room.take(choice.trajectory, choice.degree)
            chosen += packed
            deferred += left
        return chosen + _fill(deferred, room, window) if self.fill else chosen


def _take_short(
    stages: Iterable[ShortStage], room: Room, pace_of: Callable[[ShortStage, int], EfficientDegree]
) -> list[tuple[Trajectory, EfficientDegree]]:
    """Take ranks for each of these, in their order; those that got them, with the paces that `pace_of` has for them and
    the ranks that are left."""
    taken = []
    for stage in stages:
        if not room.num_free:
            break
        pace = pace_of(stage, room.free_for(stage.trajectory))
        if room.take(stage.trajectory, pace[0]):
            taken.append((stage.trajectory, pace))
    return taken


def _is_assembling(state: State, started: Sequence[tuple[Trajectory, EfficientDegree]], window: Window) -> bool:
    """Whether ranks of the last round, or of short stages that start now, come free before the grace is over.

    Packing what is idle already would cut the pool into fragments a moment before it is whole.
    """
    clock = window.clock
    grace_end_s = clock.grace_end_s(window.round)
    if window.now >= grace_end_s:
        return False
    return any(clock.is_about_to_end(flight, window.round) for flight in state.in_flight) or any(
        window.now + pace[1] <= grace_end_s for _, pace in started
    )


def _startable(candidates: Sequence[Candidate], window: Window) -> list[Candidate]:
    """Those with a degree at which a step ends before the round does."""
    tables = {id(candidate.table): candidate.table for candidate in candidates}
    startable = {name for name, table in tables.items() if table.carries_over or window.steps_that_fit(table.fastest_s)}
    return [candidate for candidate in candidates if id(candidate.table) in startable]


def pack_candidates(
    candidates: Sequence[Candidate], capacity: int, window: Window
) -> tuple[list[Choice], list[Candidate]]:
    """Algorithm 1 over candidates of one priority class, least slack first: those that run, and those that it defers.

    Of a long queue only the head is priced. Nobody with more slack has more to gain from running than one who then
    survives, on as few ranks as anybody: once there are so many of those that they fill `capacity`, no optimum contains
    a request behind them.
    """
    narrowest = min(candidate.table.narrowest for candidate in candidates)
    num_wanted = capacity // narrowest
    groups: list[OptionGroup] = []
    runs: list[list[Choice]] = []
    for candidate in candidates:
        if not num_wanted:
            break
        group, choices = options_of(candidate, window)
        groups.append(group)
        runs.append(choices)
        num_wanted -= Option(narrowest, True) in group.options
    packed: list[Choice] = []
    deferred: list[Candidate] = []
    for candidate, choices, index in zip(candidates, runs, pack_round(groups, capacity), strict=False):
        if index is None:
            deferred.append(candidate)
        else:
            packed.append(choices[index])
    return packed, deferred + list(candidates[len(groups) :])


def options_of(candidate: Candidate, window: Window) -> tuple[OptionGroup, list[Choice]]:
    """How `candidate` can run in the round: an option for each degree of its allocation, and what it starts.

    A request survives if its steps left after the round, all at its fastest degree, still end in time. An option runs
    to the end of the round, even past the steps that the allocation gives its degree (the paper's min with s_i^m):
    ranks freed in mid-round cannot be combined with others, and the next round allocates anew anyway.
    """
    trajectory, table = candidate.trajectory, candidate.table
    remaining = trajectory.remaining_steps
    latest_s = candidate.steps_by_s - remaining * table.fastest_s
    options: list[Option] = []
    choices: list[Choice] = []
    for segment in candidate.allocation(window.now + window.switch_s):
        degree = segment.degree
        step_s = table.times[degree]
        num_steps = 1 if table.carries_over else min(remaining, window.steps_that_fit(step_s))
        if num_steps == 0:
            continue
        end_s = window.end_of(num_steps, step_s)
        if num_steps < remaining:
            end_s = max(end_s, window.round.end_s)
        options.append(Option(degree, end_s <= latest_s + num_steps * table.fastest_s))
        choices.append(Choice(trajectory, table.times, degree, num_steps))
    return OptionGroup(options, window.round.end_s <= latest_s), choices


def _widened(choices: Sequence[Choice], room: Room, window: Window) -> list[Choice]:
    """`scale_up` with what is left in `room`."""
    widened, _ = scale_up(choices, room.within(choice.trajectory for choice in choices), window.steps_that_fit)
    for before, after in zip(choices, widened, strict=True):
        room.take(after.trajectory, after.degree - before.degree)
    return widened


def _fill(deferred: Sequence[Candidate], room: Room, window: Window) -> list[Choice]:
    """What the packing deferred, on ranks that would idle: least slack first."""
    chosen: list[Choice] = []
    hopeless: set[tuple[Role | None, int]] = set()  # tables none of whose degrees fits, which less room does not change
    for candidate in deferred:
        if not room.num_free:
            break
        role = room.role_of(candidate.trajectory)
        if (role, id(candidate.table)) in hopeless:
            continue
        choice = _most_steps(candidate, room.free_for(candidate.trajectory), window)
        if choice is None:
            hopeless.add((role, id(candidate.table)))
        else:
            room.take(candidate.trajectory, choice.degree)
            chosen.append(choice)
    return chosen


def _most_steps(candidate: Candidate, capacity: int, window: Window) -> Choice | None:
    """The degree that gets furthest before the round ends; the narrowest of equals."""
    best: Choice | None = None
    for degree, step_s in candidate.table.times.items():
        num_steps = min(candidate.trajectory.remaining_steps, window.steps_that_fit(step_s))
        if degree <= capacity and num_steps > (best.num_steps if best else 0):
            best = Choice(candidate.trajectory, candidate.table.times, degree, num_steps)
    return best


def _choose_ahead(
    waiting: Triage, state: State, room: Room, window: Window
) -> tuple[list[tuple[Trajectory, int]], list[Choice]]:
    """Late requests before those in time: what is owed to the oldest, and all for which the others have slack."""
    head = owed(state, window.now)
    is_spare = False
    if waiting.late or waiting.late_short:
        first_s = min((candidate.latest_start_s for candidate in waiting.on_time), default=window.now)
        is_spare = first_s - window.now >= IN_HAND_S and have_slack(
            map(_need, waiting.on_time), len(state.ranks), window.now
        )
    if head is None and not is_spare:
        return [], []
    short = [stage for stage in waiting.late_short if is_spare or stage.trajectory is head]
    late_short = _choose_late_short(short, room, window)
    late = [candidate for candidate in waiting.late if is_spare or candidate.trajectory is head]
    late.sort(key=lambda candidate: candidate.trajectory is not head)
    return late_short, _choose_late(late, room, window)


class TaskShare(NamedTuple):
    """A task of steps for one request or several, before it has ranks."""

    members: tuple[Trajectory, ...]
    degree: int
    num_steps: int

    @classmethod
    def of(cls, choice: Choice) -> TaskShare:
        return cls((choice.trajectory,), choice.degree, choice.num_steps)


def _share(shares: list[TaskShare], waiting: Triage, room: Room, window: Window, cost: CostModel) -> list[TaskShare]:
    """Selective batching, where candidates are left over: tasks of one kind are merged, what that frees is filled with
    those on time, and others ride along."""
    served = {id(member) for share in shares for member in share.members}
    left = [candidate for candidate in (*waiting.on_time, *waiting.late) if id(candidate.trajectory) not in served]
    if not left:
        return shares
    company = _Company({id(candidate.trajectory): candidate for candidate in waiting.on_time}, window, cost)
    deferred = [candidate for candidate in left if id(candidate.trajectory) in company.on_time]
    if deferred:
        merged: list[TaskShare] = []
        for share in shares:
            for index, host in enumerate(merged):
                both = company.joined(host, share.members) if host.degree == share.degree else None
                if both is not None and company.joined(share, host.members) is not None:
                    merged[index] = both
                    room.give(share.members[0], share.degree)
                    break
            else:
                merged.append(share)
        filled = _fill(deferred, room, window)
        shares = merged + [TaskShare.of(choice) for choice in filled]
        served = {id(choice.trajectory) for choice in filled}
        left = [candidate for candidate in left if id(candidate.trajectory) not in served]
    riders: dict[tuple[object, ...], list[Trajectory]] = {}
    for candidate in left:
        riders.setdefault(candidate.trajectory.request.kind, []).append(candidate.trajectory)
    return [company.with_riders(share, riders.get(share.members[0].request.kind, [])) for share in shares]


class _Company:
    """Who may share a task of one round.

    on_time: the candidates that are, by the identity of their trajectories.
    """

    def __init__(self, on_time: Mapping[int, Candidate], window: Window, cost: CostModel) -> None:
        self.on_time = on_time
        self._window = window
        self._cost = cost
        self._pays: dict[tuple[object, ...], list[tuple[int, float]]] = {}

    def joined(self, host: TaskShare, more: Sequence[Trajectory]) -> TaskShare | None:
        """`host` with `more` members; None where it does not pay, or makes one late that was on time in `host`."""
        members = (*host.members, *more)
        pays = self._pays_for(host)
        if len(members) > len(pays) or not may_share(members):
            return None
        step_s = pays[len(members) - 1][1]
        num_steps = min(host.num_steps, max(1, self._window.steps_that_fit(step_s)))
        if min(member.remaining_steps for member in more) < num_steps:
            return None
        guarded = [self.on_time[id(member)] for member in host.members if id(member) in self.on_time]
        if not all(_stays_on_time(candidate, num_steps, step_s, self._window) for candidate in guarded):
            return None
        return TaskShare(members, host.degree, num_steps)

    def with_riders(self, host: TaskShare, riders: list[Trajectory]) -> TaskShare:
        """`host` with as many of `riders` as may join, which are taken out."""
        most = len(self._pays_for(host))
        position = 0
        while position < len(riders) and len(host.members) < most:
            with_rider = self.joined(host, riders[position : position + 1])
            if with_rider is None:
                position += 1
            else:
                host = with_rider
                del riders[position]
        return host

    def _pays_for(self, host: TaskShare) -> list[tuple[int, float]]:
        request = host.members[0].request
        key = host.degree, request.kind
        if key not in self._pays:
            self._pays[key] = sizes_that_pay(self._cost, request, host.degree)
        return self._pays[key]


def _stays_on_time(candidate: Candidate, num_steps: int, step_s: float, window: Window) -> bool:
    """Whether the request would be in time if it did `num_steps` in this round, and all others like this."""
    num_left = candidate.trajectory.remaining_steps - num_steps
    end_s = window.end_of(num_steps, step_s)
    if num_left:
        end_s = max(end_s, window.round.end_s)
    return end_s + num_left * step_s <= candidate.steps_by_s


def _need(candidate: Candidate) -> Need:
    trajectory = candidate.trajectory
    gpu_s = trajectory.remaining_steps * candidate.table.efficient[0][2]
    return Need(trajectory.request.deadline_s, candidate.latest_start_s, gpu_s)


def _choose_late_short(late: Sequence[ShortStage], room: Room, window: Window) -> list[tuple[Trajectory, int]]:
    """Short stages of late requests, most urgent first, at their cheapest degrees."""
    if not room.num_free:
        return []
    startable: dict[Role | None, list[ShortStage]] = {}
    for stage in late:
        if window.may_start(stage.duration_s):
            startable.setdefault(room.role_of(stage.trajectory), []).append(stage)
    first = [
        nsmallest(room.free_for(stages[0].trajectory), stages, key=attrgetter("order")) for stages in startable.values()
    ]
    ordered = sorted(chain.from_iterable(first), key=attrgetter("order"))
    return [(trajectory, pace[0]) for trajectory, pace in _take_short(ordered, room, lambda stage, _: stage.paces[0])]


def _choose_late(late: Sequence[Candidate], room: Room, window: Window) -> list[Choice]:
    """One rank each (more only if no narrower degree fits in a round): best effort, at nobody's expense."""
    if not room.num_free:
        return []
    chosen: list[Choice] = []
    for candidate in _startable(late, window):
        if not room.num_free:
            break
        table = candidate.table
        degree = table.narrowest
        num_steps = 1 if table.carries_over else window.steps_that_fit(table.times[degree])
        if num_steps and room.take(candidate.trajectory, degree):
            num_steps = min(num_steps, candidate.trajectory.remaining_steps)
            chosen.append(Choice(candidate.trajectory, table.times, degree, num_steps))
    return chosen
