"""LoRAs in the core: who may share a task, where tasks go, what a change of adapters costs, and how it is measured."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.measured_executor import MeasuredExecutor, quiet_s
from tests.unit.test_controller import COST, make_request
from tests.unit.test_measure import CARD, POOL
from tetriserve.config import LoraConfig
from tetriserve.control import Controller
from tetriserve.control.whatif import forecast
from tetriserve.core.errors import ConfigError, ProfileError
from tetriserve.core.events import StartTask, Submitted, TaskFinished, TensorRef, WorkerJoined, WorkerLost
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Lora, Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, encoders_on_first, from_images
from tetriserve.core.trajectory import Trajectory
from tetriserve.models.card import LoraFile
from tetriserve.models.lora import with_loras
from tetriserve.policies.batching import may_share
from tetriserve.policies.fixed import FixedDegree
from tetriserve.policies.placement import num_foreign, place
from tetriserve.policies.registry import make_policy
from tetriserve.policies.room import Room
from tetriserve.policies.rssp import ResolutionSpecific
from tetriserve.profile import Profile, ProfileCost, load_profile, save_profile
from tetriserve.profile.table import MIN_TIME_S
from tetriserve.profiler.measure import measure, measure_lora
from tetriserve.simulator.run import simulate

LORA_S = 0.05
SKETCH, NEON = Lora("sketch"), Lora("neon")
WITH_LORA_S = dataclasses.replace(COST, measured_lora_s=LORA_S)
LEFT = TensorRef("left", 1)
Placed = list[tuple[int, ...]]


def with_lora(lora: Lora | None, name: str = "a", **fields: Any) -> Request:
    return dataclasses.replace(make_request(name, **fields), lora=lora)


def at_steps(lora: Lora | None, *holders: int, name: str = "a") -> Trajectory:
    return dataclasses.replace(Trajectory.at(with_lora(lora, name), 1), holders=holders)


def at_decode(lora: Lora | None) -> Trajectory:
    return Trajectory.at(with_lora(lora), 2)


def test_only_requests_with_the_same_adapter_and_scale_share_a_task() -> None:
    assert may_share([at_steps(SKETCH), at_steps(Lora("sketch"))])
    for other in (None, NEON, Lora("sketch", 0.5), Lora("sketch", digest="new")):
        assert not may_share([at_steps(SKETCH), at_steps(other)])


@pytest.mark.parametrize("team_s", [0.0, 0.7], ids=["anywhere", "in blocks"])
class TestPlacement:
    """Ranks 0 to 3; 1 has sketch active, 2 neon."""

    loras = {1: SKETCH, 2: NEON}  # noqa: RUF012

    def place(self, *wanted: tuple[Trajectory, int], team_s: float) -> Placed:
        return place(list(wanted), range(4), team_s=team_s, loras=self.loras)

    def test_a_request_gets_the_ranks_that_have_its_adapter(self, team_s: float) -> None:
        assert self.place((at_steps(SKETCH), 1), team_s=team_s) == [(1,)]
        assert self.place((at_steps(NEON), 1), team_s=team_s) == [(2,)]
        assert self.place((at_steps(None), 1), team_s=team_s) == [(0,)]
        assert self.place((at_steps(Lora("sketch", 0.5)), 1), team_s=team_s) == [(0,)]

    def test_a_rank_that_holds_its_state_comes_first(self, team_s: float) -> None:
        assert self.place((at_steps(SKETCH, 3), 1), team_s=team_s) == [(3,)]
        assert self.place((at_steps(SKETCH, 0), 1), (at_steps(SKETCH), 1), team_s=team_s) == [(0,), (1,)]

    def test_stages_that_no_adapter_changes_go_where_they_would_without(self, team_s: float) -> None:
        assert self.place((at_decode(SKETCH), 1), team_s=team_s) == [(0,)]

    def test_a_set_has_as_few_ranks_that_switch_as_can_be(self, team_s: float) -> None:
        self.loras = {2: SKETCH, 3: SKETCH}
        assert self.place((at_steps(SKETCH), 2), team_s=team_s) == [(2, 3)]
        assert self.place((at_steps(None), 2), team_s=team_s) == [(0, 1)]


def test_each_gets_the_rank_with_its_adapter_where_no_blocks_are_kept() -> None:
    placed = place([(at_steps(NEON), 1), (at_steps(SKETCH), 1)], range(4), team_s=0.0, loras={1: SKETCH, 2: NEON})
    assert placed == [(2,), (1,)]


def test_a_rank_whose_adapter_another_request_wants_is_left_to_that() -> None:
    placed = place(
        [(at_steps(Lora("new")), 1), (at_steps(SKETCH), 1)], range(2), team_s=0.0, loras={0: SKETCH, 1: NEON}
    )
    assert placed == [(1,), (0,)]


@pytest.mark.parametrize("policy", [FixedDegree(1), ResolutionSpecific()])
def test_policies_with_blocks_begin_where_the_adapter_is(policy: Any) -> None:
    state = State((Trajectory(with_lora(NEON)),), (), (0, 1, 2, 3), COST, loras={0: SKETCH, 2: NEON, 3: NEON})
    assert policy.plan(state, 0.0).tasks == (Task(("a",), ENCODE, (2,)),)


@pytest.mark.parametrize("spec", ["lookahead", "tetriserve", "edf", "fixed:1", "rssp"])
def test_a_prompt_is_encoded_where_the_adapter_is_of_the_ranks_that_may(spec: str) -> None:
    policy = make_policy(spec, COST, num_ranks=4, shapes=COST.profile.shapes)
    state = State(
        (Trajectory(with_lora(NEON)),), (), (0, 1, 2, 3), COST, stage_ranks=encoders_on_first(2, 4),
        loras={0: SKETCH, 1: NEON, 3: NEON},
    )  # fmt: skip
    assert policy.plan(state, 0.0).tasks == (Task(("a",), ENCODE, (1,)),)


@pytest.mark.parametrize(("loras", "rank"), [({0: NEON, 3: NEON}, 3), ({0: NEON}, 1)], ids=["beside", "on it"])
def test_steps_leave_a_rank_that_encodes_alone_whatever_its_adapter(loras: dict[int, Lora], rank: int) -> None:
    for policy in (FixedDegree(1), ResolutionSpecific()):
        request = dataclasses.replace(with_lora(NEON), degrees=(1,))
        state = State(
            (Trajectory.at(request, 1),), (), (0, 1, 2, 3), COST, stage_ranks=encoders_on_first(1, 4), loras=loras
        )
        assert [task.ranks for task in policy.plan(state, 0.0).tasks] == [(rank,)]
    for team_s in (0.0, 0.7):
        room = Room.of(state)
        assert room.take(at_steps(NEON))
        assert room.place([(at_steps(NEON), 1)], team_s=team_s) == [(rank,)]


def test_a_picture_is_encoded_without_regard_to_adapters() -> None:
    request = with_lora(SKETCH)
    request = dataclasses.replace(request, stages=from_images(request.stages, 1))
    assert [num_foreign(Trajectory.at(request, index), (0,), {0: NEON}) for index in range(4)] == [1, 0, 1, 0]


class Told:
    """Plans what it is told."""

    def __init__(self) -> None:
        self.tasks: tuple[Task, ...] = ()

    def plan(self, state: State, now: float) -> Plan:
        tasks, self.tasks = self.tasks, ()
        return Plan(tasks)


class Driven:
    """A controller, driven one task after the other."""

    def __init__(self, *requests: Request) -> None:
        self.policy = Told()
        self.controller = Controller(self.policy, WITH_LORA_S)
        for rank in (0, 1):
            self.controller.handle(WorkerJoined(rank), 0.0)
        for request in requests:
            self.controller.handle(Submitted(request, 0.0), 0.0)

    def run(self, name: str, stage: str, *ranks: int) -> float:
        """What the task was expected to take beyond its stage and its start."""
        num_steps = int(stage == DENOISE)
        self.policy.tasks = (Task((name,), stage, ranks, num_steps),)
        [start] = self.controller.handle_all((), 0.0)
        assert isinstance(start, StartTask)
        own_s = {ENCODE: 0.02, DECODE: 0.2, DENOISE: {1: 0.1, 2: 0.06}[len(ranks)]}[stage]
        takes_s = self.controller.end_s(start.task_id)
        self.controller.handle(TaskFinished.planned(start, own_s, LEFT), 0.0)
        return takes_s - own_s - WITH_LORA_S.switch_s

    @property
    def loras(self) -> dict[int, Lora]:
        return dict(self.controller.state.loras)


def test_the_state_says_which_adapter_each_rank_has_and_a_change_is_expected_to_cost() -> None:
    driven = Driven(with_lora(SKETCH, "a"), with_lora(NEON, "b"), with_lora(None, "c"))
    assert driven.loras == {}
    assert driven.run("c", ENCODE, 0) == pytest.approx(0.0)
    assert driven.run("a", ENCODE, 0) == pytest.approx(LORA_S)
    assert driven.run("a", DENOISE, 0) == pytest.approx(0.0)
    assert driven.loras == {0: SKETCH}
    assert driven.run("b", ENCODE, 1) == pytest.approx(LORA_S)
    assert driven.run("b", DENOISE, 0, 1) == pytest.approx(LORA_S)  # rank 0 switches
    assert driven.loras == {0: NEON, 1: NEON}
    assert driven.run("c", DENOISE, 0) == pytest.approx(LORA_S)
    assert driven.loras == {1: NEON}
    for _ in range(3):
        driven.run("a", DENOISE, 0)
    assert driven.run("a", DECODE, 1) == pytest.approx(0.0)
    assert driven.loras == {0: SKETCH, 1: NEON}, "decoding leaves the adapter as it is"
    driven.controller.handle(WorkerLost(1, "killed"), 0.0)
    driven.controller.handle(WorkerJoined(1), 0.0)
    assert driven.loras == {0: SKETCH}, "a fresh process has none"


def test_a_forecast_knows_of_adapters_and_leaves_the_controller_as_it_is() -> None:
    driven = Driven(with_lora(SKETCH, "a"))
    driven.run("a", ENCODE, 0)
    policy = make_policy("fcfs", COST, num_ranks=2, shapes=COST.profile.shapes)
    ahead = [
        forecast(driven.controller, 0.0, policy, more=[with_lora(lora, "new", num_steps=1)]).finish_s["new"]
        for lora in (SKETCH, NEON)
    ]
    assert ahead[1] - ahead[0] == pytest.approx(2 * LORA_S)  # to encode, and with rank 1 for the steps
    assert driven.loras == {0: SKETCH}


def test_the_simulator_charges_each_change_of_adapters() -> None:
    def finish_s(*loras: Lora | None) -> float:
        requests = [with_lora(lora, f"r{number}", num_steps=1) for number, lora in enumerate(loras)]
        return max(outcome.finish_s for outcome in simulate(FixedDegree(1), WITH_LORA_S, requests, num_ranks=1))

    plain = finish_s(None, None, None)
    assert finish_s(SKETCH, SKETCH, SKETCH) == pytest.approx(plain + LORA_S)
    assert finish_s(SKETCH, NEON, NEON) == pytest.approx(plain + 2 * LORA_S)
    assert finish_s(SKETCH, None, SKETCH) == pytest.approx(plain + 3 * LORA_S)


class Switching(MeasuredExecutor):
    """Rank 0 takes `LORA_S` longer where the adapter changes."""

    def __init__(self) -> None:
        super().__init__(lambda shape, task, go: (quiet_s(task) + self._extra_s, quiet_s(task)))
        self.active: Lora | None = None
        self._extra_s = 0.0

    def start_task(self, command: StartTask) -> None:
        lora, self._extra_s = command.work[0].request.lora, 0.0
        if command.task.stage != DECODE and 0 in command.task.ranks:
            self._extra_s = LORA_S if lora != self.active else 0.0
            self.active = lora
        super().start_task(command)


@pytest.mark.parametrize("names", [("sketch",), ("sketch", "neon"), ("sketch", "neon", "third")])
async def test_a_change_of_adapters_is_measured_by_steps_that_switch_and_steps_that_stay(
    names: tuple[str, ...],
) -> None:
    loras = tuple(LoraFile(name=name, file=Path(name), digest="d") for name in names)
    card = dataclasses.replace(CARD, loras=loras)
    assert await measure_lora(Switching(), card, POOL, Shape(256, 256)) == pytest.approx(LORA_S)
    profile = await measure(Switching(), card, POOL, CARD.sizes[:1], lambda done, total, text: None, share=0.0)
    assert profile.lora_s == pytest.approx(LORA_S)
    bare = await measure(Switching(), CARD, POOL, CARD.sizes[:1], lambda done, total, text: None, share=0.0)
    assert bare.lora_s == 0.0


def test_a_profile_keeps_what_a_change_takes_and_goes_before_what_was_measured_at_the_start(tmp_path: Path) -> None:
    profile: Profile = dataclasses.replace(COST.profile, lora_s=0.25)
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    assert ProfileCost(profile, measured_lora_s=LORA_S).lora_s == 0.25
    observed = WITH_LORA_S.observed(Task(("a",), DENOISE, (0,), 1), make_request(), 0.2)
    assert observed.lora_s == LORA_S
    with pytest.raises(ProfileError, match="lora_s"):
        dataclasses.replace(profile, lora_s=MIN_TIME_S / 2)


@pytest.mark.parametrize("text", ["sketch", "=a.safetensors", "sketch="])
def test_an_option_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"lora is {text!r}; write NAME=PATH, such as")):
        LoraConfig.parse(text)


def test_a_path_may_hold_an_equals_sign() -> None:
    assert LoraConfig.parse("a/b=x=y.safetensors") == LoraConfig("a/b", "x=y.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"execution": Execution("float32", compile="regional")}, "lora is set with compile 'regional', which is not"),
        ({"execution": Execution("bfloat16", quantization="fp8")}, "lora is set with quantization 'fp8', which is not"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused_before_any_file_is_read(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_loras(dataclasses.replace(CARD, **fields), [LoraConfig("sketch", "missing")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny", "lora is called 'tiny', as the model or another LoRA is; give it another name"),
        ("default", "lora is called 'default', as the model or another LoRA is"),
        (" ", "lora is called ' '; allowed: 1 to 200 printable characters"),
    ],
)
def test_names_that_clients_could_not_use_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_loras(CARD, [LoraConfig(name, "missing")])
