"""Reservations in a timeline of future capacity, renewed at every event, instead of rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from tetriserve.core.cluster import Role
from tetriserve.core.cost import times_per_step
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.batching import Sharing
from tetriserve.policies.overdue import IN_HAND_S, Need, have_slack, owed
from tetriserve.policies.reservation import LONG_S, JobBook, PendingJob, expected_end_s, num_reserved, reserve
from tetriserve.policies.room import Room
from tetriserve.policies.stages import place_short_stages, within
from tetriserve.policies.timeline import EPSILON_S, Piece, Timeline

TASK_S = 0.25
"""Length of a task of steps with a reservation: how long an urgent arrival may have to wait for its ranks."""

FILL_TASK_S = 0.12
"""Length of a task of steps without one, unless a single step takes longer."""

SHARED_TASK_S = 0.3
"""The same of a task that several share: what each leaves behind is written at its end."""

FILL_STEP_S = 0.25
"""Longest step of such a task; for a shape whose fastest step takes more than half of it, twice that step."""

GRACE_S = 0.002
"""How long after a reservation should have begun the policy asks to be asked again: the event that frees its ranks
normally comes first, and this is for when it does not."""


HEADROOM = 0.25
"""How many ranks steps and short stages longer than `LONG_S` leave idle when they widen or fill, as a fraction of the
pool; at least one."""

RESERVED_HEADROOM = 0.5
"""Ranks that a request keeps free when it reserves, as a fraction of the pool, if its steps are longer than `LONG_S`
at every degree and requests with shorter steps arrived lately. One step of a large video may take longer than the
deadline of an image."""

OWED_STEP_S = 0.13
"""Longest step of a task that is owed to an overdue request, unless its fastest is longer: it holds the ranks that all
others wait for, so it is wide and over soon."""

RIDING_SHARE = 0.25
"""Part of its slack that a request with a reservation gives up at most, in one task, for those that ride along."""

AGED_S = 60.0
"""Once a request is this long past its deadline the pool is overloaded for good: those without reservations then run in
order of their deadlines, at degrees that waste less."""

AGED_STEP_S = 0.45
"""Longest step of a late request then."""

RESOLUTION = 0.03
"""How coarse the timeline of a large pool is, as a fraction of how far ahead it looks."""

EXACT_RANKS = 16
"""Up to this many ranks the timeline is exact."""


class Lookahead:
    """Reserves future ranks for every request that can end in time, and lets nothing else stand in their way.

    At every event: (a) the ranks of tasks in flight count as free from their predicted ends on; (b) requests reserve
    the cheapest way to their deadlines in that timeline (`reservation.reserve`), and those whose reservations begin
    now start; (c) these widen where ranks are left; (d) all others, requests that are late or that did not fit, fill
    what is still left, in short tasks. Widening and filling use only ranks that are free until the task ends, so that
    no reservation is ever delayed (conservative backfilling). Late requests reserve before (b) only what is owed to
    them, or what those in time have slack for (`policies.overdue`). Nothing is kept: the next event reserves anew, with
    tasks so short that changing the plan is cheap.

    Where requests would be late that way, those of one kind share tasks (`policies.batching`): they reserve together if
    that keeps more of them in time, others ride along where that costs those with reservations no more than a part of
    their slack, and what fills the holes does so in batches.
    """

    def __init__(
        self, *, task_s: float = TASK_S, promote: bool = True, widen: bool = True, batching: bool = True
    ) -> None:
        """
        Args:
            task_s: length of a task of steps, in seconds.
            promote: try again with those ahead that did not fit.
            widen: give tasks ranks that would idle.
            batching: let requests of one kind share tasks.
        """
        self.batching = batching
        self.task_s = task_s
        self.promote = promote
        self.widen = widen
        self._book = JobBook(task_s)

    def plan(self, state: State, now: float) -> Plan:
        """See `Policy.plan`. Asks again if what the next reservation waits for is overdue."""
        if not state.waiting or not state.idle_ranks:
            return Plan()
        jobs = self._book.jobs(state, now)
        timeline = _timeline_of(state, now)
        in_time = [job for job in jobs if job.latest_s >= now - EPSILON_S]
        late = [job for job in jobs if job.is_waiting and job.latest_s < now - EPSILON_S]
        late.sort(key=attrgetter("deadline_s"))
        ahead = _ahead(late, in_time, state, timeline, now)
        headroom, limit = _headroom(in_time, state), num_reserved(len(state.ranks))
        reservations = reserve(in_time, timeline, limit, promote=self.promote, headroom=headroom)
        sharing = None
        if self.batching and state.cost.max_batch > 1 and (reservations.failed or len(late) > len(ahead)):
            sharing = Sharing(state, now, self.task_s)
            bundles = sharing.bundles(in_time)
            together = reserve(bundles, timeline, limit, promote=self.promote, headroom=headroom)
            if together.is_better_than(reservations):
                reservations = together
        widest = max([job.widest for job in jobs], default=1)
        start = _Start(now, state.cost.switch_s, widest, reservations.timeline, len(state.ranks), sharing)
        served = {id(job) for job, _ in ahead}
        failed = [part for job in reservations.failed for part in job.parts if part.is_waiting]
        late = [job for job in late if id(job) not in served]
        if sharing is not None:
            start.riders = _by_kind(sorted(failed, key=lambda job: (job.priority, job.gpu_s)))
        begins_s = []
        for job, pieces, widen in (
            *((job, (piece,), False) for job, piece in ahead),
            *((job, pieces, self.widen) for job, pieces in reservations.kept if job.is_waiting),
        ):
            if pieces[0].start_s > now + EPSILON_S:
                begins_s.append(pieces[0].start_s)
            elif pieces[0].num_steps:
                start.steps(job, pieces, self.task_s, widen=widen)
            else:
                start.short_stage(next(part for part in job.parts if part.here.short), pieces[0].degree)
        start.fill(failed, late)
        return Plan(start.tasks(state), wake_at=min(begins_s) + GRACE_S if begins_s else None)


def _headroom(jobs: Iterable[PendingJob], state: State) -> int:
    """How many ranks long steps keep free for arrivals: 0 unless requests with shorter steps arrived lately."""
    if not any(job.speeds.are_long for job in jobs):
        return 0
    steps_s = [min(times_per_step(state.cost, request).values(), default=math.inf) for request in state.lately]
    return int(RESERVED_HEADROOM * len(state.ranks)) if min(steps_s, default=math.inf) <= LONG_S else 0


def _timeline_of(state: State, now: float) -> Timeline:
    """What is idle and what will be, of all ranks and of those alone that may run what not every rank may."""
    resolution = RESOLUTION if len(state.ranks) > EXACT_RANKS else 0.0
    ends = [(expected_end_s(flight, now), flight.task) for flight in state.in_flight]
    timeline = Timeline.of(
        now, len(state.idle_ranks), [(end_s, task.degree) for end_s, task in ends], resolution=resolution
    )
    if not state.stage_ranks:
        return timeline
    timeline.narrower = {
        ranks: Timeline.of(
            now,
            len(ranks.intersection(state.idle_ranks)),
            [(end_s, len(ranks.intersection(task.ranks))) for end_s, task in ends],
            resolution=resolution,
        )
        for ranks in state.stage_ranks.unions
    }
    return timeline


def _ahead(
    late: Sequence[PendingJob], in_time: Sequence[PendingJob], state: State, timeline: Timeline, now: float
) -> list[tuple[PendingJob, Piece]]:
    """Tasks of late requests, earliest deadline first, that reserve before those in time do; claimed in `timeline`.

    What is owed to the oldest starts as soon as its ranks are free; what the others can spare starts now or not at all.
    """
    if not late:
        return []
    head = owed(state, now)
    is_spare = min((job.latest_s for job in in_time), default=now) - now >= IN_HAND_S and have_slack(
        [Need(job.deadline_s, job.latest_s, job.gpu_s) for job in in_time], len(state.ranks), now
    )
    if head is None and not is_spare:
        return []
    ahead = []
    for job in late:
        is_owed = job.trajectory is head
        if not is_owed and (not is_spare or not timeline.free[0]):
            continue
        piece = _late_piece(job, timeline, now, state.cost.switch_s, OWED_STEP_S if is_owed else FILL_STEP_S)
        if is_owed or piece.start_s <= now + EPSILON_S:
            timeline.claim([piece])
            ahead.append((job, piece))
    return ahead


def _late_piece(job: PendingJob, timeline: Timeline, now: float, switch_s: float, longest_s: float) -> Piece:
    """The next task of a late request, as early as it can start, at the narrowest degree of steps that short."""
    if job.here.short:
        (degree, duration_s, _), role = job.here.short[0], job.here.role
        start_s = timeline.of_role(role).earliest(duration_s, now, degree)
        return Piece(start_s, start_s + duration_s, degree, role=role)
    times = job.speeds.times
    degree = next(degree for degree, step_s in times.items() if step_s <= max(longest_s, job.speeds.fastest_s))
    num_steps = min(job.num_steps, _steps_in(TASK_S, times[degree]))
    duration_s = switch_s + num_steps * times[degree]
    role = job.here.steps_role
    start_s = timeline.of_role(role).earliest(duration_s, now, degree)
    return Piece(start_s, start_s + duration_s, degree, num_steps, role)


class _Wanted(NamedTuple):
    """A task of steps before it has ranks."""

    members: Sequence[Trajectory]
    degree: int
    num_steps: int


class _Start:
    """What starts now.

    timeline: what the reservations leave free.
    widest: the largest degree of any task.
    num_ranks: living ranks, busy ones included.
    sharing: None where each task is for one request.
    riders: those without a reservation that may still be in time, by kind, in the order in which they are served.
    """

    def __init__(
        self,
        now: float,
        switch_s: float,
        widest: int,
        timeline: Timeline,
        num_ranks: int,
        sharing: Sharing | None,
    ) -> None:
        self.now = now
        self.timeline = timeline
        self._short: list[tuple[Trajectory, int]] = []
        self._ready_s = now + switch_s - EPSILON_S
        self._widest = widest
        self._num_ranks = num_ranks
        self._free_until = timeline.free_until(widest)
        self._free_until_for: dict[Role, list[float]] = {}
        self._sharing = sharing
        self.riders: Mapping[int, Sequence[PendingJob]] = {}
        self._started: set[int] = set()
        self._wanted: list[_Wanted] = []

    def steps(self, job: PendingJob, pieces: Sequence[Piece], task_s: float, *, widen: bool) -> None:
        """Start the first of `pieces`, or its first `task_s`, at the fastest degree that ranks left over allow.

        All wider degrees are considered, as in `scale_up`.
        """
        piece, times = pieces[0], job.speeds.times
        most = min([part.num_steps for part in job.parts])
        degree, num_steps = piece.degree, min(piece.num_steps, most, _steps_in(task_s, times[piece.degree]))
        if widen:
            free_until = self._until(job.here.steps_role)
            for wider, step_s in times.items():
                added = wider - piece.degree
                if added > 0 and step_s < times[degree] and self._leaves_headroom(added, step_s):
                    hole_s = min(free_until[added], piece.end_s) - self._ready_s
                    fitting = min(most, int(hole_s / step_s), _steps_in(task_s, step_s))
                    if fitting > 0:
                        degree, num_steps = wider, fitting
            if degree > piece.degree:
                self._claim(num_steps * times[degree], degree - piece.degree, job.here.steps_role)
        members = self._with_riders(job, degree, num_steps, job.deadline_s - pieces[-1].end_s)
        self._want(members, degree, num_steps)

    def short_stage(self, job: PendingJob, num_ranks: int) -> None:
        """Start the short stage that a job is at, on so many ranks, or on as many of them as it can use."""
        self._short.append((job.trajectory, within(job.here.short, num_ranks)[0]))
        self._started.add(id(job))

    def _with_riders(self, job: PendingJob, degree: int, num_steps: int, slack_s: float) -> list[PendingJob]:
        """The requests of `job`, and those without a reservation for which it takes a little of its own `slack_s`."""
        members = [*job.parts]
        if self._sharing is None or job.trajectory.is_apart:
            return members
        speeds = self._sharing.speeds(job)
        for rider in self.riders.get(id(job.ahead), ()):
            if len(members) == len(speeds):
                break
            added_s = num_steps * (speeds[len(members)].times.get(degree, math.inf) - job.speeds.times[degree])
            if added_s > RIDING_SHARE * slack_s:
                break
            if self._may_ride(rider) and rider.num_steps >= num_steps:
                members.append(rider)
        return members

    def _may_ride(self, job: PendingJob) -> bool:
        return id(job) not in self._started and not job.here.short and not job.trajectory.is_apart

    def _want(self, jobs: Sequence[PendingJob], degree: int, num_steps: int) -> None:
        self._started.update(map(id, jobs))
        self._wanted.append(_Wanted([job.trajectory for job in jobs], degree, num_steps))

    def fill(self, failed: Sequence[PendingJob], late: Sequence[PendingJob]) -> None:
        """Short tasks of requests without a reservation: first those that could still be in time, as they may yet fit.

        Within a priority class these run least GPU time first, late ones earliest deadline first. Once one has waited
        for `AGED_S`, all do: those that do not fit now will not fit later either, and what they begin, they delay.

        Args:
            late: earliest deadline first.
        """
        is_aged = bool(late) and self.now - late[0].deadline_s > AGED_S
        if is_aged:
            ordered = sorted((*failed, *late), key=lambda job: (job.priority, job.deadline_s))
        else:
            ordered = sorted(failed, key=lambda job: (job.priority, job.gpu_s))
            ordered += sorted(late, key=attrgetter("priority"))
        hopeless: set[tuple[int, Role | None, bool]] = set()
        is_crowded = len(ordered) > self.timeline.free[0]
        alike = {} if self._sharing is None else _by_kind(ordered)
        for job in ordered:
            if self._free_until[1] <= self._ready_s:
                return
            if id(job) in self._started:
                continue
            if job.here.short:
                self._fill_short(job)
                continue
            is_patient = is_aged and job.latest_s < self.now - EPSILON_S
            kind = id(job.speeds), job.here.steps_role, is_patient
            if kind in hopeless:
                continue
            others = alike.get(id(job.ahead), ())
            if is_crowded and (partner := self._partner_to_fetch(job, others)) and self._fill_short(partner):
                continue
            if not self._fill_together(job, others, is_patient=is_patient):
                hopeless.add(kind)

    def _fill_short(self, job: PendingJob) -> bool:
        free_until = self._until(job.here.role)
        for degree, duration_s, _ in job.here.short:
            is_fitting = self.now + duration_s <= free_until[degree] + EPSILON_S
            if is_fitting and self._leaves_headroom(degree, duration_s, narrowest=job.here.short[0][0]):
                self._claim_until(self.now + duration_s, degree, job.here.role)
                self.short_stage(job, degree)
                return True
        return False

    def _partner_to_fetch(self, job: PendingJob, others: Sequence[PendingJob]) -> PendingJob | None:
        """The first that is yet to come to the stage with steps and could then share the task of `job`, which waits."""
        if self._sharing is None or job.trajectory.is_apart:
            return None
        num_missing = len(self._sharing.speeds(job)) - 1
        for other in others:
            if num_missing <= 0:
                break
            if other is not job and id(other) not in self._started:
                if other.here.short and not other.trajectory.is_apart:
                    return other
                num_missing -= 1
        return None

    def _fill_together(self, job: PendingJob, others: Sequence[PendingJob], *, is_patient: bool) -> bool:
        """Start a task for as many as pay and fit, `job` first."""
        if self._sharing is None or job.trajectory.is_apart:
            return self._fill_steps([job], job.speeds.times, is_patient=is_patient)
        speeds, members = self._sharing.speeds(job), [job]
        for other in others:
            if len(members) == len(speeds):
                break
            if other is not job and self._may_ride(other):
                members.append(other)
        return any(
            self._fill_steps(members[:count], speeds[count - 1].times, is_patient=is_patient)
            for count in range(len(members), 0, -1)
        )

    def _fill_steps(self, jobs: Sequence[PendingJob], times: Mapping[int, float], *, is_patient: bool) -> bool:
        """Start a task at the narrowest degree whose step is short enough; failing that at the fastest that fits."""
        job, task_s = jobs[0], FILL_TASK_S if len(jobs) == 1 else SHARED_TASK_S
        most = min([each.num_steps for each in jobs])
        longest_s = max(AGED_STEP_S if is_patient else FILL_STEP_S, 2 * job.speeds.fastest_s)
        degree = num_steps = 0
        free_until = self._until(job.here.steps_role)
        narrowest = next((wider for wider, step_s in times.items() if step_s <= longest_s), min(times))
        for wider, step_s in times.items():
            hole_s = free_until[wider] - self._ready_s
            if step_s > min(hole_s, longest_s) or (degree and step_s >= times[degree]):
                continue
            if not self._leaves_headroom(wider, step_s, narrowest=narrowest):
                continue
            degree, num_steps = wider, min(most, int(hole_s / step_s), _steps_in(task_s, step_s))
            if is_patient or step_s <= FILL_TASK_S:
                break
        if degree:
            self._claim(num_steps * times[degree], degree, job.here.steps_role)
            self._want(jobs, degree, num_steps)
        return degree > 0

    def _leaves_headroom(self, num_added: int, duration_s: float, *, narrowest: int = 1) -> bool:
        """Whether enough ranks stay idle beside `num_added` more, or those are soon free again.

        narrowest: what could never leave as many, on a pool as small as it is, leaves what it can.
        """
        headroom = min(max(1, int(HEADROOM * self._num_ranks)), self._num_ranks - narrowest)
        return duration_s <= LONG_S or num_added + headroom <= self.timeline.free[0]

    def tasks(self, state: State) -> tuple[Task, ...]:
        """Everything started, on ranks."""
        room, team_s = Room.of(state), state.cost.team_s
        started = [each for each in self._wanted if room.take(each.members[0], each.degree)]
        short = [each for each in self._short if room.take(*each)]
        tasks = []
        placed = room.place([(wanted.members[0], wanted.degree) for wanted in started], team_s=team_s)
        for wanted, ranks in zip(started, placed, strict=True):
            names = tuple([trajectory.request_id for trajectory in wanted.members])
            tasks.append(Task(names, wanted.members[0].stage.kind, ranks, wanted.num_steps))
        return (*tasks, *place_short_stages(short, room, team_s=team_s))

    def _until(self, role: Role | None) -> list[float]:
        """Until when so many ranks are free for stages of this role, by their number; see `Timeline.free_until`."""
        if role is None:
            return self._free_until
        if role not in self._free_until_for:
            self._free_until_for[role] = self.timeline.of_role(role).free_until(self._widest)
        return self._free_until_for[role]

    def _claim(self, duration_s: float, num_ranks: int, role: Role | None) -> None:
        self._claim_until(self._ready_s + duration_s, num_ranks, role)

    def _claim_until(self, end_s: float, num_ranks: int, role: Role | None) -> None:
        self.timeline.claim([Piece(self.now, end_s, num_ranks, role=role)])
        self._free_until = self.timeline.free_until(self._widest)
        self._free_until_for.clear()


def _by_kind(jobs: Iterable[PendingJob]) -> dict[int, list[PendingJob]]:
    """`jobs` in their order, by what all of a kind have in common."""
    found: dict[int, list[PendingJob]] = {}
    for job in jobs:
        found.setdefault(id(job.ahead), []).append(job)
    return found


def _steps_in(task_s: float, step_s: float) -> int:
    return max(1, int(task_s / step_s))
