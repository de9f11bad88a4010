"""Work-conserving elastic scale-up: ranks left over widen tasks that are about to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from tetriserve.core.trajectory import Trajectory


class Choice(NamedTuple):
    """A task with steps whose ranks are still to be chosen.

    times: seconds per step by degree, for the degrees that it may run at.
    """

    trajectory: Trajectory
    times: Mapping[int, float]
    degree: int
    num_steps: int


def scale_up(choices: Sequence[Choice], spare: int, steps_that_fit: Callable[[float], int]) -> tuple[list[Choice], int]:
    """Widen `choices` with `spare` ranks, the one that benefits most first: TetriServe, section 4.2.3.

    The benefit of a wider degree is the time that its steps would have taken longer at the present degree,
    steps * (T(k) - T(k')), counting the steps that fit before the task has to end. All wider degrees are considered,
    not only the next one: a profile may be slower at 2 and 4 ranks than at 1 and yet fastest at 8. Equal benefits go to
    fewer ranks, then to the choice listed first.

    Args:
        steps_that_fit: how many steps of the given seconds fit before the tasks have to end.

    Returns:
        The choices in the same order, and the ranks still left.
    """
    widened = list(choices)
    offers = [_best_offer(number, choice, spare, steps_that_fit) for number, choice in enumerate(choices)]
    queue = [offer for offer in offers if offer is not None]
    heapify(queue)
    while queue:
        offer = heappop(queue)
        number = offer.number
        if offer.num_added <= spare:
            spare -= offer.num_added
            widened[number] = offer.choice
        again = _best_offer(number, widened[number], spare, steps_that_fit)
        if again is not None:
            heappush(queue, again)
    return widened, spare


class _Offer(NamedTuple):
    """What choice `number` would make of `num_added` ranks more; the best offer comes first in order."""

    negative_benefit_s: float
    num_added: int
    number: int
    choice: Choice


def _best_offer(number: int, choice: Choice, spare: int, steps_that_fit: Callable[[float], int]) -> _Offer | None:
    """None when up to `spare` ranks more make no difference."""
    best: _Offer | None = None
    step_s = choice.times[choice.degree]
    for degree, wider_s in choice.times.items():
        if not 0 < degree - choice.degree <= spare or wider_s >= step_s:
            continue
        num_steps = min(choice.trajectory.remaining_steps, steps_that_fit(wider_s))
        wider = Choice(choice.trajectory, choice.times, degree, num_steps)
        offer = _Offer(-num_steps * (step_s - wider_s), degree - choice.degree, number, wider)
        if num_steps and (best is None or offer[:2] < best[:2]):
            best = offer
    return best
