"""Least slack first: ranks go to whom waiting hurts most, as few as the deadline needs; late requests come last."""

from tetriserve.core.cost import stages_gpu_s, times_per_step
from tetriserve.core.errors import ConfigError
from tetriserve.core.plan import CostModel, Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import place
from tetriserve.policies.registry import PolicyContext

TASK_S = 0.25


def make_least_slack(context: PolicyContext) -> "LeastSlack":
    """`least-slack` for `--policy` and `--policies`."""
    if context.argument:
        raise ConfigError(f"policy 'least-slack:{context.argument}': it takes no argument; write 'least-slack'")
    return LeastSlack()


class LeastSlack:
    def plan(self, state: State, now: float) -> Plan:
        spare, chosen = len(state.idle_ranks), []
        slacks = [(slack_s(trajectory, state.cost, now), trajectory) for trajectory in state.waiting]
        for slack, trajectory in sorted(slacks, key=lambda pair: (pair[1].request.priority, pair[0] < 0, pair[0])):
            degree, num_steps = 1, 0
            if not trajectory.is_short:
                steps, times = trajectory.remaining_steps, times_per_step(state.cost, trajectory.request)
                # Slack is counted at the fastest degree; at a slower one every step uses some of it up.
                in_time = [k for k in times if steps * (times[k] - min(times.values())) <= slack]
                degree = min((k for k in in_time if k <= len(state.ranks)), default=min(times))
                num_steps = min(steps, max(1, int(TASK_S / times[degree])))
            if degree <= spare:
                chosen.append((trajectory, degree, num_steps))
                spare -= degree
            elif slack >= 0:
                break  # whoever went past it would take the ranks that it waits for
        placed = place(
            [(trajectory, degree) for trajectory, degree, _ in chosen], state.idle_ranks, team_s=state.cost.team_s
        )
        return Plan(
            tuple(
                Task((trajectory.request_id,), trajectory.stage.kind, ranks, num_steps)
                for (trajectory, _, num_steps), ranks in zip(chosen, placed, strict=True)
            )
        )


def slack_s(trajectory: Trajectory, cost: CostModel, now: float) -> float:
    """Seconds that the request can still wait and be in time, at its fastest degree."""
    request = trajectory.request
    after = request.stages[request.stages.index(request.stepped) + 1 :]
    left_s = trajectory.remaining_steps * min(times_per_step(cost, request).values())
    left_s += stages_gpu_s(cost, request, after)
    return request.deadline_s - now - left_s - 2 * cost.switch_s
