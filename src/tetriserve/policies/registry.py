"""The one list of policies: command line, server and tests all choose by these names."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from tetriserve.core.cost import times_per_step
from tetriserve.core.errors import ConfigError
from tetriserve.core.plan import CostModel
from tetriserve.core.probes import probe
from tetriserve.core.request import Request, Shape
from tetriserve.policies.disaggregate import Disaggregate
from tetriserve.policies.exhaustive import NUM_NODES, Exhaustive
from tetriserve.policies.fixed import FirstComeFirstServed, FixedDegree
from tetriserve.policies.greedy import (
    ListScheduler,
    Order,
    earliest_deadline,
    shortest_job,
    shortest_remaining,
)
from tetriserve.policies.lookahead import Lookahead
from tetriserve.policies.policy import Policy
from tetriserve.policies.rounds import fixed_round, round_lengths
from tetriserve.policies.rssp import ResolutionSpecific
from tetriserve.policies.tetriserve import TetriServe
from tetriserve.policies.unsteady import Unsteady

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "tetriserve.policies"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """What a policy may know of the pool when it is made.

    argument: what followed the colon in the policy's name; empty without one.
    probes: a request of each model and shape that the cost model was measured at, as clients send it by default.
    slack_s: how long a request of the smallest size can wait if it has the default deadline (`workload.slo.slack_s`).
    """

    argument: str
    cost: CostModel
    num_ranks: int
    probes: tuple[Request, ...]
    slack_s: float = math.inf

    def step_times(self, request: Request) -> dict[int, float]:
        """Seconds per step by degree, for the degrees that fit on the pool."""
        times = times_per_step(self.cost, request)
        return {degree: step_s for degree, step_s in times.items() if degree <= self.num_ranks}

    @property
    def degrees(self) -> tuple[int, ...]:
        """Every degree that some measured shape can run at on this pool, ascending."""
        return tuple(sorted({degree for request in self.probes for degree in self.step_times(request)}))

    @property
    def reference(self) -> Request:
        """The largest shape measured; of several models', the one whose step takes longest at its fastest degree."""
        largest: dict[str, Request] = {}
        for request in self.probes:
            known = largest.setdefault(request.model, request)
            if request.shape.num_pixels > known.shape.num_pixels:
                largest[request.model] = request
        return max(largest.values(), key=lambda request: min(self.step_times(request).values(), default=0.0))


PolicyFactory = Callable[[PolicyContext], Policy]


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """One entry of the list.

    usage: how to write it, arguments included.
    is_for_study: too slow for more than a few requests, or no way to serve; `all` leaves it out.
    """

    usage: str
    summary: str
    make: PolicyFactory
    is_for_study: bool = False


def _refuse_argument(context: PolicyContext, name: str) -> None:
    if context.argument:
        raise ConfigError(f"policy '{name}:{context.argument}': {name} takes no argument; write '{name}'")


def _make_fcfs(context: PolicyContext) -> Policy:
    batch = _batch_of(context.argument, context.cost) if context.argument else 1
    if batch is None:
        raise ConfigError(f"policy 'fcfs:{context.argument}': cannot use {context.argument!r}; write {_FCFS_USAGE}")
    return FirstComeFirstServed(batch)


def _batch_of(option: str, cost: CostModel) -> int | None:
    """The N of `batch=N`, as far as the cost model goes; None if it is something else."""
    name, _, value = option.partition("=")
    return min(int(value), cost.max_batch) if name == "batch" and _is_count(value) else None


def _make_unsteady(context: PolicyContext) -> Policy:
    _refuse_argument(context, "unsteady")
    return Unsteady()


def _list_scheduler(name: str, order: Order, *, best_fit: bool = False) -> PolicyFactory:
    def make(context: PolicyContext) -> Policy:
        _refuse_argument(context, name)
        return ListScheduler(order, best_fit=best_fit)

    return make


def _make_rssp(context: PolicyContext) -> Policy:
    return ResolutionSpecific(**_switches(context.argument, {"backfill": False}, "rssp", _RSSP_USAGE))


def _make_fixed(context: PolicyContext) -> Policy:
    allowed = [str(degree) for degree in context.degrees]
    degree, has_option, option = context.argument.partition(":")
    if degree not in allowed:
        raise ConfigError(
            f"policy 'fixed:{context.argument}': the degree must be one of {', '.join(allowed)} "
            f"on {context.num_ranks} ranks, for example 'fixed:{allowed[-1]}'"
        )
    batch = _batch_of(option, context.cost) if has_option else 1
    if batch is None:
        raise ConfigError(f"policy 'fixed:{context.argument}': cannot use {option!r}; write {_FIXED_USAGE}")
    return FixedDegree(int(degree), batch)


_SWITCHES = {"on": True, "off": False}
_FIXED_USAGE = "fixed:K[:batch=N]"
_FCFS_USAGE = "fcfs[:batch=N]"
_TETRISERVE_USAGE = "tetriserve[:step_granularity=G,placement=on|off,scale_up=on|off,fill=on|off,batching=on|off]"

_RSSP_USAGE = "rssp[:backfill=on|off]"
_EXHAUSTIVE_USAGE = "exhaustive[:nodes=N]"
_LOOKAHEAD_USAGE = "lookahead[:promote=on|off,widen=on|off,batching=on|off]"


def _switches(argument: str, defaults: Mapping[str, bool], policy: str, usage: str) -> dict[str, bool]:
    """The options `name=on` or `name=off` in `argument`, over `defaults`."""
    switches = dict(defaults)
    for item in filter(None, argument.split(",")):
        name, _, value = item.partition("=")
        if name not in switches or value not in _SWITCHES:
            raise ConfigError(f"policy {policy!r}: cannot use option {item!r}; write {usage}")
        switches[name] = _SWITCHES[value]
    return switches


def _is_count(text: str) -> bool:
    """Whether `text` is a whole number from 1 to 999,999,999."""
    return text.isdecimal() and len(text) <= 9 and int(text) >= 1


def _make_tetriserve(context: PolicyContext) -> Policy:
    step_granularity: int | None = None
    switches = {"placement": True, "scale_up": True, "fill": True, "batching": True}
    for item in filter(None, context.argument.split(",")):
        name, _, value = item.partition("=")
        if name == "step_granularity" and _is_count(value):
            step_granularity = int(value)
        elif name in switches and value in _SWITCHES:
            switches[name] = _SWITCHES[value]
        else:
            raise ConfigError(f"policy 'tetriserve': cannot use option {item!r}; write {_TETRISERVE_USAGE}")
    reference = context.step_times(context.reference)
    switch_s = context.cost.switch_s
    if step_granularity is None:
        lengths_s = round_lengths(reference, switch_s, context.slack_s)
    else:
        lengths_s = (fixed_round(step_granularity, reference, switch_s),)
    return TetriServe(lengths_s=lengths_s, **switches)


def _make_lookahead(context: PolicyContext) -> Policy:
    switches = _switches(
        context.argument, {"promote": True, "widen": True, "batching": True}, "lookahead", _LOOKAHEAD_USAGE
    )
    return Lookahead(**switches)


def _make_disaggregate(context: PolicyContext) -> Policy:
    inner = ListScheduler(earliest_deadline, best_fit=True)
    if not context.argument:
        return Disaggregate(inner)
    most = context.num_ranks - 1
    if not (_is_count(context.argument) and int(context.argument) <= most):
        allowed = f"1 to {most}" if most else "none, as there is one rank"
        raise ConfigError(
            f"policy 'disaggregate:{context.argument}': the ranks set aside must be a number; allowed: {allowed}"
        )
    return Disaggregate(inner, int(context.argument))


def _make_exhaustive(context: PolicyContext) -> Policy:
    max_nodes = NUM_NODES
    if context.argument:
        name, _, value = context.argument.partition("=")
        if name != "nodes" or not _is_count(value):
            raise ConfigError(f"policy 'exhaustive': cannot use option {context.argument!r}; write {_EXHAUSTIVE_USAGE}")
        max_nodes = int(value)
    return Exhaustive(max_nodes)


POLICIES: Mapping[str, PolicySpec] = {
    "tetriserve": PolicySpec(
        _TETRISERVE_USAGE, "rounds, deadline-aware degrees and packing by dynamic programming", _make_tetriserve
    ),
    "lookahead": PolicySpec(
        _LOOKAHEAD_USAGE, "reservations in a timeline of future capacity; late requests fill its holes", _make_lookahead
    ),
    "fixed": PolicySpec(_FIXED_USAGE, "one degree for all, first come first served, non-preemptive", _make_fixed),
    "fcfs": PolicySpec(_FCFS_USAGE, "one request after the other, each at its fastest degree", _make_fcfs),
    "rssp": PolicySpec(_RSSP_USAGE, "one degree per shape, first come first served, non-preemptive", _make_rssp),
    "sjf": PolicySpec("sjf", "shortest job first, non-preemptive", _list_scheduler("sjf", shortest_job)),
    "srtf": PolicySpec("srtf", "shortest remaining time first", _list_scheduler("srtf", shortest_remaining)),
    "edf": PolicySpec("edf", "earliest deadline first, as wide as fits", _list_scheduler("edf", earliest_deadline)),
    "edf-best-fit": PolicySpec(
        "edf-best-fit",
        "earliest deadline first, as narrow as the deadline allows, widened into idle ranks",
        _list_scheduler("edf-best-fit", earliest_deadline, best_fit=True),
    ),
    "disaggregate": PolicySpec(
        "disaggregate[:K]",
        "edf-best-fit with K ranks set aside for encode and decode; by default as many as their part of the work",
        _make_disaggregate,
    ),
    "exhaustive": PolicySpec(
        _EXHAUSTIVE_USAGE,
        "exact search over all schedules of the requests known now; for tiny instances",
        _make_exhaustive,
        is_for_study=True,
    ),
    "unsteady": PolicySpec(
        "unsteady",
        "another degree and other ranks at every step, by lot; shows that pictures do not depend on the schedule",
        _make_unsteady,
        is_for_study=True,
    ),
}


def make_policy(
    spec: str,
    cost: CostModel,
    *,
    num_ranks: int,
    shapes: Sequence[Shape] = (),
    probes: Sequence[Request] = (),
    slack_s: float = math.inf,
) -> Policy:
    """The policy that `spec` names: `"tetriserve"`, `"fixed:2"`, `"fcfs"`, or one from an installed package.

    A package registers a policy under the entry-point group `tetriserve.policies`: a callable from `PolicyContext` to a
    policy. Installed packages are searched only when the name is not built in.

    Args:
        cost: the cost model at start; `tetriserve` takes the lengths of its rounds from it.
        num_ranks: ranks of the pool.
        shapes: the shapes that the cost model was measured at, at least one.
        probes: instead, where there are several models or steps of several passes: a request of each model and shape.
        slack_s: how long a request of the smallest size can wait if it has the default deadline.

    Raises:
        ConfigError: the name is unknown or its argument is not allowed; the message says what is.
    """
    make = find_policy(spec)
    context = PolicyContext(
        argument=spec.partition(":")[2],
        cost=cost,
        num_ranks=num_ranks,
        probes=tuple(probes) or tuple(map(probe, shapes)),
        slack_s=slack_s,
    )
    if not context.degrees:
        raise ConfigError(f"policy {spec!r}: no measured shape can run on {num_ranks} ranks")
    return make(context)


def warn_of_long_rounds(spec: str, policy: Policy, slack_s: float) -> None:
    """Log one line where even the shortest round of `policy` is longer than a request of the smallest size can wait.

    Args:
        spec: the policy as the user named it.
        slack_s: as `make_policy` was given it.
    """
    if isinstance(policy, TetriServe) and policy.shortest_s > slack_s:
        logger.warning(
            "a round of policy %s takes %.3g s, and a request of the smallest size with the default deadline can wait "
            "%.3g s: those that arrive during a round may be late; looser deadlines or lookahead, which has no rounds, "
            "avoid that%s",
            spec,
            policy.shortest_s,
            max(0.0, slack_s),
            ", and without step_granularity rounds adapt" if "step_granularity" in spec else "",
        )


def find_policy(spec: str) -> PolicyFactory:
    """What makes the policy that `spec` names, before anything is known of the pool.

    Raises:
        ConfigError: the name is unknown; the message lists those that are not.
    """
    name = spec.partition(":")[0]
    if name in POLICIES:
        return POLICIES[name].make
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name in found:
        factory: PolicyFactory = found[name].load()
        return factory
    allowed = [policy.usage for policy in POLICIES.values()] + sorted(found)
    raise ConfigError(f"unknown policy {spec!r}; choose one of: {', '.join(allowed)}")
