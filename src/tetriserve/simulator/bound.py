"""An upper bound on the number of requests that any scheduler, however clairvoyant, can finish in time.

**The program.** Choose x_i in {0, 1} (request i is attained), maximise the sum of x_i, subject to, for every interval
[s, t] between an arrival and a deadline,

    sum over i of w_i(s, t) * x_i  <=  N * (t - s)

where N is the number of ranks and w_i(s, t) the least GPU time that i spends inside [s, t] in any schedule in which it
is attained. Requests whose fastest schedule is longer than their window are left out. What a real schedule attains
satisfies every row, because N ranks offer N * (t - s) and requests that are not attained only take more away. So the
optimum is at least what any schedule attains; so is the optimum over fewer rows, and so is any dual bound.

**w_i(s, t).** A request is a chain of stages that must be run through in order. A short stage takes T(k) seconds at a
degree k, with the start of its task, and k * T(k) GPU seconds; so does each step of a stage that has some. Requests
that share a task each take their part of its GPU time, so that a degree k in a batch of b is one more pace: T(k, b)
seconds a step for k * T(k, b) / b GPU seconds. Further tasks, pauses, transfers and waiting only add to it. Let the
window have L seconds before s, R after t and I inside. In L seconds no schedule gets further than the fastest one, so
at least the rest of the chain lies after s; in R seconds nobody runs more of its end than the fastest one. What the
fastest schedule leaves in between must be run inside [s, t] (energetic reasoning: the part that cannot be done
outside). It has m_j steps of stage j, perhaps fractions of them, a short stage being one step, and takes F seconds at
the fastest. The points (T(k), k * T(k)) of the m_j steps have a mean on or above the lower convex hull H_j of stage
j, and the means x_j satisfy sum of m_j * x_j <= I: hence at least the least sum of m_j * H_j(x_j) under this condition.
Each H_j is convex and falls, so that the I - F seconds to spare go to the edges of all hulls in order of what a second
saves, until they are used up. With L = R = 0 this is the least GPU time of the whole request: with one stage the cost
of a mix of two degrees (TetriServe, 4.2.1) whose numbers of steps need not be whole.

**Size.** Rows are generated: the relaxation is solved with some, and those that its solution breaks are added.
Intervals that span many arrivals use every second arrival and deadline, longer ones every fourth, and so on. More
requests than `BLOCK` are cut into blocks in order of arrival, each given the whole pool: leaving out the others' work
relaxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from tetriserve.core.plan import CostModel
from tetriserve.core.request import Request
from tetriserve.simulator.leastwork import SLACK_S, Chain, Floats, chain_of

BLOCK = 400
"""Requests in one program at most."""
NEAR = 64
"""Intervals over this many deadlines or fewer are all looked at; of longer ones ever fewer."""
NODE_LIMIT = 500
TIME_LIMIT_S = 10.0
"""Where the search for whole numbers stops. The first comes first, so that answers do not depend on the machine."""

_MAX_ROUNDS = 40
_MAX_SEARCHES = 3
_ROUNDING = 1e-4
_NEARLY_FULL = 0.98
_CHUNK = 2048
_TOLERANCE = 1e-6

_Ints = npt.NDArray[np.intp]
_Flags = npt.NDArray[np.bool_]
_Rows: TypeAlias = Any  # scipy.sparse.csr_array, which has no types


def max_attained(requests: Sequence[Request], cost: CostModel, num_ranks: int, *, is_relaxed: bool = False) -> int:
    """A number that no schedule of `requests` on `num_ranks` ranks can attain more of; see the module.

    Holds where tasks take what `cost` says, exactly.

    Args:
        is_relaxed: let x_i be fractions: quicker, and never below the bound with whole numbers.
    """
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    blocks = [ordered[start : start + BLOCK] for start in range(0, len(ordered), BLOCK)]
    return sum(_max_attained_block(block, cost, num_ranks, is_relaxed) for block in blocks)


def _max_attained_block(requests: Sequence[Request], cost: CostModel, num_ranks: int, is_relaxed: bool) -> int:
    jobs = _possible(requests, cost, num_ranks)
    if not jobs.chains:
        return 0
    rows, capacity = _intervals(jobs, num_ranks)
    num_jobs = len(jobs.chains)
    none = np.zeros(rows.shape[0], dtype=np.bool_)
    chosen, x, value = _generate(rows, capacity, num_jobs, none, is_whole=False)
    if not is_relaxed:
        # Rows with room to spare only slow the search down; where it needs one after all it is added again.
        tight = chosen & (rows @ x > _NEARLY_FULL * capacity)
        value = min(value, _generate(rows, capacity, num_jobs, tight, is_whole=True)[2])
    return math.floor(value + _ROUNDING)


@dataclass(frozen=True)
class _Jobs:
    """The requests whose fastest schedule fits their window: start and end of it, and the chain."""

    starts: Floats
    ends: Floats
    chains: list[Chain]


def _possible(requests: Sequence[Request], cost: CostModel, num_ranks: int) -> _Jobs:
    known: dict[tuple[object, ...], Chain | None] = {}
    found = []
    for request in requests:
        key = (request.kind, request.num_steps)
        if key not in known:
            known[key] = chain_of(request, cost, num_ranks)
        chain, end = known[key], request.deadline_s + SLACK_S
        if chain is not None and chain.fastest_s <= end - request.arrival_s:
            found.append((request.arrival_s, end, chain))
    return _Jobs(
        np.array([start for start, _, _ in found]), np.array([end for _, end, _ in found]), [job[2] for job in found]
    )


def _intervals(jobs: _Jobs, num_ranks: int) -> tuple[_Rows, Floats]:
    """Least work of every request (columns) in every interval that could be overfull (rows), and what each offers."""
    begins, ends = _endpoints(np.unique(jobs.starts), np.unique(jobs.ends))
    blocks, offers = [sparse.csr_array((0, len(jobs.chains)))], [np.zeros(0)]
    for start in range(0, len(begins), _CHUNK):
        begin, end = begins[start : start + _CHUNK], ends[start : start + _CHUNK]
        work = _work(jobs, begin, end)
        offer = num_ranks * (end - begin)
        overfull = work.sum(axis=1) > offer + _TOLERANCE
        blocks.append(sparse.csr_array(work[overfull]))
        offers.append(offer[overfull])
    return sparse.csr_array(sparse.vstack(blocks, format="csr")), np.concatenate(offers)


def _endpoints(starts: Floats, ends: Floats) -> tuple[Floats, Floats]:
    """Pairs of an arrival and a later deadline: all that are near, and ever fewer of those that are far apart."""
    first = np.searchsorted(ends, starts, side="right")
    pairs: list[tuple[_Ints, _Ints]] = []
    stride, low = 1, 0
    while low < len(ends):
        high = NEAR * stride
        lefts = np.arange(0, len(starts), stride)
        offsets = np.arange(low, high, stride)
        left, right = (grid.ravel() for grid in np.meshgrid(lefts, offsets, indexing="ij"))
        right = first[left] + right
        is_inside = right < len(ends)
        pairs.append((left[is_inside], right[is_inside]))
        stride, low = 2 * stride, high
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return starts[left], ends[right]


def _work(jobs: _Jobs, begins: Floats, ends: Floats) -> Floats:
    """Least work as a matrix: intervals by requests."""
    left = np.clip(begins[:, None] - jobs.starts, 0.0, None)
    right = np.clip(jobs.ends - ends[:, None], 0.0, None)
    windows = jobs.ends - jobs.starts
    is_touched = left + right < windows
    is_cut = is_touched & ((left > 0) | (right > 0))
    work = np.zeros(left.shape)
    for chain in dict.fromkeys(jobs.chains):
        own = np.array([other == chain for other in jobs.chains])
        whole = chain.least_work(windows, 0.0, 0.0)
        work[:, own] = np.where(is_touched & ~is_cut, whole, 0.0)[:, own]
        row, column = np.nonzero(is_cut & own)
        work[row, column] = chain.least_work(windows[column], left[row, column], right[row, column])
    return work


def _generate(
    rows: _Rows, capacity: Floats, num_jobs: int, chosen: _Flags, *, is_whole: bool
) -> tuple[_Flags, Floats, float]:
    """Solve with the `chosen` rows, add those that the solution breaks, and again.

    Returns:
        The rows chosen, the last solution, and the least bound seen.
    """
    chosen, x, value = chosen.copy(), np.ones(num_jobs), float(num_jobs)
    for _ in range(_MAX_SEARCHES if is_whole else _MAX_ROUNDS):
        result = milp(
            -np.ones(num_jobs),
            integrality=np.full(num_jobs, int(is_whole)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(rows[chosen], -np.inf, capacity[chosen])] if chosen.any() else (),
            options={"node_limit": NODE_LIMIT, "time_limit": TIME_LIMIT_S} if is_whole else {},
        )
        limit = result.mip_dual_bound if is_whole else result.fun
        value = value if limit is None else min(value, -float(limit))
        if result.x is None or not result.success:
            break
        x = result.x
        excess = np.where(chosen, 0.0, rows @ x - capacity)
        if not len(excess) or excess.max() <= _TOLERANCE:
            break
        worst = np.argsort(-excess, kind="stable")[: max(50, num_jobs)]
        chosen[worst[excess[worst] > _TOLERANCE]] = True
    return chosen, x, value
