"""A cluster of two nodes with two ranks each, on real processes: requests change nodes, and survive the loss of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pytest

from tests.local_nodes import LocalFleet
from tests.waiting import HANG_S, until
from tests.wanderer import NODES, RANKS_PER_NODE, STEPS_PER_TASK, Wanderer, wandering_engine
from tetriserve.config import PoolConfig
from tetriserve.core.events import Event, FailureKind, StartTask, StateLost, TaskFailed, WorkerLost
from tetriserve.core.plan import Task
from tetriserve.core.request import Request
from tetriserve.core.stages import DENOISE
from tetriserve.engine import (
    EndedTask,
    Generated,
    GeneratedImage,
    Generation,
    LiveEngine,
    Observation,
    Occurred,
)
from tetriserve.executor.cluster import ClusterExecutor
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile

NUM_NODES = 2
NUM_STEPS = 6

Paint = Callable[[Request], np.ndarray]
Made: TypeAlias = asyncio.Future[Generated]


@dataclass
class Setup:
    """A running engine over a cluster, and what was seen of it."""

    engine: LiveEngine
    executor: ClusterExecutor
    fleet: LocalFleet
    policy: Wanderer
    events: list[Event]
    ended: list[EndedTask]

    def observe(self, observation: Observation) -> None:
        match observation:
            case Occurred(event, _):
                self.events.append(event)
            case EndedTask():
                self.ended.append(observation)

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def nodes_of(self, request_id: str) -> list[int]:
        """Where the tasks of a request ran that finished, in order."""
        tasks = [ended.run.task for ended in self.ended if ended.results]
        return [NODES.of(task.ranks[0]) for task in tasks if request_id in task.members]

    async def until_idle(self) -> None:
        await until(lambda: len(self.engine.state.ranks) == RANKS_PER_NODE * NUM_NODES)
        await until(lambda: not self.engine.state.trajectories and not self.engine.state.in_flight)
        await until(lambda: not self.left())

    def left(self) -> list[str]:
        """What is there of any request, at the head and on nodes."""
        stores = [self.executor._directory.path, *(link.store for link in self.fleet.links if not link._is_cut)]
        names = [path.name for store in stores for path in store.iterdir()]
        return [name for name in names if not name.startswith(("lock", "team-", ".preview-basis"))]


@pytest.fixture(scope="module")
async def cluster(bundled_card: ModelCard, profile: Profile) -> AsyncIterator[Setup]:
    local = PoolConfig(num_ranks=RANKS_PER_NODE, heartbeat_timeout_s=HANG_S)
    pool = PoolConfig(num_ranks=RANKS_PER_NODE * NUM_NODES, degrees=(1, 2), start_timeout_s=HANG_S)
    fleet = LocalFleet(NUM_NODES, [bundled_card], local)
    executor = ClusterExecutor(fleet, pool, RANKS_PER_NODE)
    await executor.start(lambda text: None)
    policy = Wanderer()
    engine = wandering_engine(executor, policy, bundled_card, profile, pool.degrees)
    engine.start()
    setup = Setup(engine, executor, fleet, policy, [], [])
    engine.subscribe(setup.observe)
    try:
        yield setup
    finally:
        await engine.stop()


@pytest.fixture
async def setup(cluster: Setup) -> AsyncIterator[Setup]:
    cluster.policy.degree, cluster.policy.only = 1, None
    await cluster.until_idle()
    cluster.events.clear()
    cluster.ended.clear()
    yield cluster


def generation(prompt: str, num_steps: int = NUM_STEPS) -> Generation:
    return Generation(prompt=prompt, size="256x256", num_steps=num_steps, seed=len(prompt), slo_s=600.0)


async def admitted(setup: Setup, prompt: str, num_steps: int = NUM_STEPS) -> tuple[Request, Made]:
    (client,) = await setup.engine.admit([generation(prompt, num_steps)])
    return client.request, client.made


async def pixels(made: Made) -> np.ndarray:
    async with asyncio.timeout(HANG_S):
        image = await made
    assert isinstance(image, GeneratedImage)
    return image.pixels


async def test_a_request_that_changes_nodes_with_every_task_has_the_bits_of_one_process(
    setup: Setup, paint: Paint
) -> None:
    request, made = await admitted(setup, "a red circle")
    image = await pixels(made)
    nodes = setup.nodes_of(request.request_id)
    assert len(nodes) == 2 + NUM_STEPS // STEPS_PER_TASK
    assert all(before != after for before, after in zip(nodes, nodes[1:], strict=False))
    assert np.array_equal(image, paint(request))


async def test_many_requests_at_degree_2_on_both_nodes_are_answered_each_with_its_own_image(
    setup: Setup, paint: Paint
) -> None:
    setup.policy.degree = 2
    begun = [await admitted(setup, "a boat" + " at sea" * number) for number in range(8)]
    images = await asyncio.gather(*(pixels(made) for _, made in begun))
    wide = {NODES.of(ended.run.task.ranks[0]) for ended in setup.ended if ended.run.task.degree == 2}
    assert wide == {0, 1}
    for (request, _), image in zip(begun, images, strict=True):
        assert np.abs(image.astype(int) - paint(request)).max() <= 1


async def test_the_loss_of_a_node_costs_a_request_one_task_and_the_node_returns(setup: Setup, paint: Paint) -> None:
    link = setup.executor._slots[1].link
    begun = [await admitted(setup, "a tree" + " by a lake" * number, 12) for number in range(4)]

    def is_under_way() -> bool:
        flights = [flight.task for flight in setup.engine.state.in_flight]
        return len(setup.ended) > 12 and any(NODES.of(task.ranks[0]) == 1 for task in flights)

    await until(is_under_way)
    link.kill()
    await until(lambda: setup.of(TaskFailed))
    setup.fleet.add()
    images = await asyncio.gather(*(pixels(made) for _, made in begun))
    assert sorted(event.rank for event in setup.of(WorkerLost)) == [2, 3]
    lost = setup.of(TaskFailed)
    assert lost and all(event.kind is FailureKind.LOST for event in lost)
    assert len(lost) <= RANKS_PER_NODE, "no more than ran on the node"
    for (request, _), image in zip(begun, images, strict=True):
        assert np.array_equal(image, paint(request))
    await setup.until_idle()
    setup.policy.only = frozenset({1})
    request, made = await admitted(setup, "a house")
    assert np.array_equal(await pixels(made), paint(request))
    assert set(setup.nodes_of(request.request_id)) == {1}


async def test_a_request_whose_last_states_were_not_copied_goes_back_to_those_that_were(
    setup: Setup, paint: Paint
) -> None:
    link = setup.executor._slots[1].link
    setup.policy.only = frozenset({0})
    request, made = await admitted(setup, "a long river", 12)
    await until(lambda: len(setup.nodes_of(request.request_id)) >= 2)
    link.copies_are_held, setup.policy.only = True, frozenset({1})
    await until(lambda: setup.nodes_of(request.request_id)[-2:] == [1, 1])
    link.kill()
    setup.policy.only = frozenset({0})
    image = await pixels(made)
    (back,) = setup.of(StateLost)
    assert back.request_id == request.request_id
    assert 0 < back.steps_done < 12
    assert np.array_equal(image, paint(request))
    setup.fleet.add()
    await setup.until_idle()


async def test_a_set_of_ranks_across_nodes_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="several nodes"):
        setup.executor.start_task(StartTask(10**6, Task(("r",), DENOISE, (1, 2), 1), ()))
