"""Late requests beside those in time: what they are owed, what the others can spare, and how long they wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.control.overdue import LateAccount
from tetriserve.control.tracker import Tracker
from tetriserve.core.events import FinishRequest, Submitted
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.policies.overdue import INSTALMENT_S, OVERDUE_S, Need, have_slack, owed
from tetriserve.policies.registry import make_policy
from tetriserve.profile.bundled import open_profile
from tetriserve.profile.cost import ProfileCost
from tetriserve.simulator.run import Simulation

COST = ProfileCost(open_profile("flux.1-dev-8xh100"), lambda shape: (1, 2))
SHAPE = Shape(512, 512)


def request(name: str, arrival_s: float, slo_s: float, num_steps: int) -> Request:
    return Request(
        request_id=name, prompt="", shape=SHAPE, stages=image_stages(num_steps), seed=0, arrival_s=arrival_s,
        deadline_s=arrival_s + slo_s,
    )  # fmt: skip


class ClosedLoop(Simulation):
    """Clients on two ranks who each ask again as soon as they are answered, until `until_s`."""

    until_s = 60.0
    num_asked = 0

    def _finish(self, command: FinishRequest) -> None:
        super()._finish(command)
        if command.request.request_id.startswith("client"):
            self.ask()

    def ask(self) -> None:
        if self.now < self.until_s:
            self.num_asked += 1
            self._pool.expect(self.now, Submitted(request(f"client {self.num_asked}", self.now, 20.0, 28)))


@pytest.mark.parametrize("policy", ["lookahead", "tetriserve"])
def test_late_requests_get_what_requests_with_seconds_of_slack_do_not_need(policy: str) -> None:
    loop = ClosedLoop(make_policy(policy, COST, num_ranks=2, shapes=[SHAPE]), COST, num_ranks=2)
    for _ in range(4):
        loop.ask()
    late = [request(f"late {number}", 5.0 + number, 0.001, 4) for number in range(3)]
    ended = list(loop.run(late))
    waits_s = [o.finish_s - o.request.arrival_s for o in ended if o.request.request_id.startswith("late")]
    alone_s = (
        COST.times(late[0], late[0].stage_of(ENCODE))[1]
        + 4 * COST.times(late[0], late[0].stage_of(DENOISE))[1]
        + COST.times(late[0], late[0].stage_of(DECODE))[1]
    )
    assert len(waits_s) == 3
    assert max(waits_s) <= 10 * alone_s
    clients = [o for o in ended if o.request.request_id.startswith("client")]
    assert len(clients) > 40
    assert sum(o.is_attained for o in clients) >= 0.99 * len(clients)


def test_credit_accrues_from_the_moment_a_request_is_overdue_and_is_gone_with_the_last() -> None:
    account = LateAccount(0.1)
    account.accrue(10.0, 8, first_deadline_s=10.0 - OVERDUE_S)
    assert account.balance_s == 0
    account.accrue(12.0, 8, first_deadline_s=10.0 - OVERDUE_S)
    assert account.balance_s == pytest.approx(0.1 * 8 * 2)
    account.accrue(1e4, 8, first_deadline_s=10.0 - OVERDUE_S)
    assert account.balance_s == INSTALMENT_S
    account.accrue(1e4 + 1, 8, first_deadline_s=1e4)
    assert account.balance_s == 0


def test_only_the_request_longest_overdue_is_charged_and_by_one_task_at_most() -> None:
    account = LateAccount(0.1)
    account.accrue(20.0, 8, first_deadline_s=0.0)
    full_s = account.balance_s
    account.charge(1.0, deadline_s=5.0, now=20.0, first_deadline_s=0.0)
    assert account.balance_s == full_s
    for _ in range(3):
        account.charge(50.0, deadline_s=0.0, now=20.0, first_deadline_s=0.0)
    assert account.balance_s == -50


def test_a_fork_of_the_account_goes_its_own_way() -> None:
    account = LateAccount(0.1)
    account.accrue(20.0, 8, first_deadline_s=0.0)
    fork = account.fork()
    assert fork.balance_s == account.balance_s
    fork.accrue(21.0, 8, first_deadline_s=0.0)
    assert fork.balance_s > account.balance_s


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_and_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        LateAccount(share)


def test_slack_counts_what_is_due_before_and_keeps_some_in_hand() -> None:
    relaxed = Need(deadline_s=20.0, latest_s=19.0, gpu_s=1.0)
    assert have_slack([relaxed] * 4, 2, now=0.0)
    assert not have_slack([relaxed] * 40, 2, now=0.0)  # 20 s of work due in 20 s
    assert not have_slack([relaxed, Need(3.0, 2.0, 1.0)], 2, now=0.0)  # one is pressed


def test_a_request_that_living_ranks_cannot_run_keeps_the_share_from_nobody() -> None:
    wide = replace(request("wide", 0.0, 1.0, 4), degrees=(2,))
    other = request("other", 0.0, 5.0, 4)
    for ranks, head in (((0,), other), ((0, 1), wide)):
        tracker = Tracker()
        tracker.ranks |= set(ranks)
        for each in (wide, other):
            tracker.admit(each, each.deadline_s)
        assert tracker.first_deadline_s == head.deadline_s
        trajectory = owed(tracker.state(COST, INSTALMENT_S), now=60.0)
        assert trajectory is not None
        assert trajectory.request is head
