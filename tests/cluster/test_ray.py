"""Two Ray nodes with two ranks each, and a head without any, on this machine: every request has its own image."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.waiting import HANG_S, until
from tests.wanderer import NODES, RANKS_PER_NODE, Wanderer, wandering_engine
from tetriserve.config import PoolConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.events import TaskFailed, WorkerLost
from tetriserve.core.request import Request
from tetriserve.engine import EndedTask, GeneratedImage, Generation, LiveEngine, Observation, Occurred
from tetriserve.executor.cluster import ClusterExecutor
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile

pytest.importorskip("ray", reason="ray is not installed")

NUM_NODES, NUM_REQUESTS, NUM_STEPS = 2, 64, 4

Paint = Callable[[Request], np.ndarray]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(NUM_NODES):
        cluster.add_node(num_cpus=RANKS_PER_NODE, object_store_memory=10**8)
    yield cluster
    cluster.shutdown()


@dataclass
class Setup:
    engine: LiveEngine
    executor: ClusterExecutor
    policy: Wanderer
    cluster: Any
    observed: list[Observation]

    @property
    def ended(self) -> list[EndedTask]:
        return [each for each in self.observed if isinstance(each, EndedTask) and each.results]

    def of(self, *kinds: type) -> list[Any]:
        return [each.event for each in self.observed if isinstance(each, Occurred) and isinstance(each.event, kinds)]


@pytest.fixture(scope="module")
async def setup(cluster: Any, bundled_card: ModelCard, profile: Profile) -> AsyncIterator[Setup]:
    from tetriserve.executor.ray import RayFleet

    fleet = RayFleet(cluster.address, [bundled_card], PoolConfig(num_ranks=RANKS_PER_NODE, heartbeat_timeout_s=HANG_S))
    assert fleet.num_nodes == NUM_NODES
    pool = PoolConfig(num_ranks=RANKS_PER_NODE * NUM_NODES, degrees=(1, 2), start_timeout_s=HANG_S)
    executor = ClusterExecutor(fleet, pool, RANKS_PER_NODE, silence_s=10.0)  # others may use the machine too
    await executor.start(lambda text: None)
    policy = Wanderer()
    engine = wandering_engine(executor, policy, bundled_card, profile, pool.degrees)
    observed: list[Observation] = []
    engine.subscribe(observed.append)
    engine.start()
    try:
        yield Setup(engine, executor, policy, cluster, observed)
    finally:
        await engine.stop()


async def made(setup: Setup, prompts: list[str], num_steps: int = NUM_STEPS) -> list[tuple[Request, np.ndarray]]:
    """The images of `prompts`, beside each its request."""
    wanted = [
        Generation(prompt=prompt, size="256x256", num_steps=num_steps, seed=number, slo_s=600.0)
        for number, prompt in enumerate(prompts)
    ]
    clients = await setup.engine.admit(wanted)
    async with asyncio.timeout(HANG_S):
        images = await asyncio.gather(*(client.made for client in clients))
    pixels = [image.pixels for image in images if isinstance(image, GeneratedImage)]
    return list(zip([client.request for client in clients], pixels, strict=True))


def test_no_cluster_at_the_address_is_one_line(bundled_card: ModelCard) -> None:
    """It comes first: later this process is connected to one."""
    from tetriserve.executor.ray import RayFleet

    with pytest.raises(ConfigError, match=r"^there is no Ray cluster at address '127.0.0.1:1'; [^\n]*$"):
        RayFleet("127.0.0.1:1", [bundled_card], PoolConfig())


async def test_requests_that_change_nodes_have_the_bits_of_one_process(setup: Setup, paint: Paint) -> None:
    setup.policy.degree = 1
    ((request, pixels),) = await made(setup, ["a red circle"])
    nodes = [NODES.of(each.run.task.ranks[0]) for each in setup.ended]
    assert set(nodes) == {0, 1}
    assert np.array_equal(pixels, paint(request))


async def test_many_requests_are_answered_each_with_its_own_image(setup: Setup, paint: Paint) -> None:
    setup.policy.degree = 2
    answers = await made(setup, ["a boat" + " at sea" * (number % 7) for number in range(NUM_REQUESTS)])
    wide = {NODES.of(each.run.task.ranks[0]) for each in setup.ended if each.run.task.degree == 2}
    assert wide == {0, 1}
    for request, pixels in answers:
        assert np.abs(pixels.astype(int) - paint(request)).max() <= 1


async def test_a_killed_agent_costs_its_requests_one_task_and_is_replaced(setup: Setup, paint: Paint) -> None:
    import ray

    setup.policy.degree = 1
    setup.observed.clear()
    making = asyncio.create_task(made(setup, ["a tree" + " by a lake" * number for number in range(6)], 12))
    await until(lambda: len(setup.ended) > 10)
    ray.kill(setup.executor._slots[1].link._actor)  # type: ignore[attr-defined]
    answers = await making
    assert sorted(event.rank for event in setup.of(WorkerLost)) == [2, 3]
    assert len(setup.of(TaskFailed)) <= RANKS_PER_NODE
    for request, pixels in answers:
        assert np.array_equal(pixels, paint(request))
    await until(lambda: len(setup.engine.state.ranks) == RANKS_PER_NODE * NUM_NODES)


async def test_a_lost_node_costs_its_requests_one_task_and_another_takes_its_slot(setup: Setup, paint: Paint) -> None:
    setup.policy.degree = 1
    setup.observed.clear()
    lost_id = setup.executor._slots[1].link._node_id  # type: ignore[attr-defined]
    (node,) = [node for node in setup.cluster.worker_nodes if node.node_id == lost_id]
    making = asyncio.create_task(made(setup, ["a house" + " on a hill" * number for number in range(6)], 12))
    await until(lambda: len(setup.ended) > 10)
    await asyncio.to_thread(setup.cluster.remove_node, node, allow_graceful=False)
    answers = await making
    assert sorted(event.rank for event in setup.of(WorkerLost)) == [2, 3]
    assert len(setup.of(TaskFailed)) <= RANKS_PER_NODE
    for request, pixels in answers:
        assert np.array_equal(pixels, paint(request))
    setup.cluster.add_node(num_cpus=RANKS_PER_NODE, object_store_memory=10**8)  # sets handlers of signals
    await until(lambda: len(setup.engine.state.ranks) == RANKS_PER_NODE * NUM_NODES)
    setup.policy.only = frozenset({1})
    ((request, pixels),) = await made(setup, ["a star"])
    assert np.array_equal(pixels, paint(request))
