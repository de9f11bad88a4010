"""A policy for tests of clusters, under which requests change their node as often as they can."""

from __future__ import annotations

from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.cluster import Nodes
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.stages import DENOISE
from tetriserve.core.trajectory import Trajectory
from tetriserve.engine import Intake, LiveEngine
from tetriserve.executor.protocol import Executor
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile, ProfileCost

RANKS_PER_NODE = 2
STEPS_PER_TASK = 2
NODES = Nodes(RANKS_PER_NODE)


class Wanderer:
    """Tasks of two steps, each on another node than the one before where that has room; at `degree` where it fits."""

    def __init__(self) -> None:
        self.degree = 1
        self.only: frozenset[int] | None = None
        """Nodes that tasks may start on; None for all."""

    def plan(self, state: State, now: float) -> Plan:
        free = NODES.by_node(state.idle_ranks)
        if self.only is not None:
            free = {node: ranks for node, ranks in free.items() if node in self.only}
        tasks = []
        for trajectory in state.waiting:
            ranks = self._ranks(trajectory, free)
            if ranks:
                node = NODES.of(ranks[0])
                free[node] = tuple(rank for rank in free[node] if rank not in ranks)
                num_steps = 0 if trajectory.is_short else min(STEPS_PER_TASK, trajectory.remaining_steps)
                tasks.append(Task((trajectory.request_id,), trajectory.stage.kind, ranks, num_steps))
        return Plan(tuple(tasks))

    def _ranks(self, trajectory: Trajectory, free: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
        degree = self.degree if trajectory.stage.kind == DENOISE else 1
        here = {NODES.of(rank) for rank in trajectory.holders}
        fitting = [node for node, ranks in free.items() if len(ranks) >= degree]
        node = min(fitting, key=lambda node: (node in here, node), default=None)
        return () if node is None else free[node][:degree]


def wandering_engine(
    executor: Executor, policy: Wanderer, card: ModelCard, profile: Profile, degrees: tuple[int, ...]
) -> LiveEngine:
    """An engine under `policy`, to be started. Forecasts have a policy of their own."""
    cost = ProfileCost(profile, lambda shape: card.valid_degrees(degrees))
    return LiveEngine(
        Controller(policy, cost), executor, [Intake(card=card, cost=cost)], Foresight(Wanderer),
        max_queue=256, policy_name="test",
    )  # fmt: skip
