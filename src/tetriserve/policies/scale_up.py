"""Work-conserving elastic scale-up: ranks left over widen tasks that are about to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tetriserve.core.trajectory import Trajectory


class Choice(NamedTuple):
    """A denoise task whose ranks are still to be chosen.

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
    while spare > 0:
        best_benefit = (0.0, 0)
        best: tuple[int, Choice] | None = None
        for index, choice in enumerate(widened):
            step_s = choice.times[choice.degree]
            for degree, wider_s in choice.times.items():
                if not 0 < degree - choice.degree <= spare or wider_s >= step_s:
                    continue
                num_steps = min(choice.trajectory.remaining_steps, steps_that_fit(wider_s))
                benefit = (num_steps * (step_s - wider_s), choice.degree - degree)
                if benefit > best_benefit:
                    best_benefit = benefit
                    best = index, Choice(choice.trajectory, choice.times, degree, num_steps)
        if best is None:
            break
        index, wider = best
        spare -= wider.degree - widened[index].degree
        widened[index] = wider
    return widened, spare
