"""Where the states of requests lie in a cluster, and to which step each can go back. It knows no transport."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetriserve.core.events import Result, StateLost, TensorRef, Work

HEAD = -1
"""The place of the controller's own store, beside those of nodes, which are numbered from 0."""


@dataclass(eq=False)
class _Course:
    """One request.

    stands: the steps that it can go back to, oldest first: the newest whose states are all at the head, and those
        after it.
    places: where each state is, by key.
    """

    stands: list[StateLost]
    places: dict[str, set[int]] = field(default_factory=dict)

    def is_there(self, stand: StateLost) -> bool:
        return all(self.places.get(ref.key) for ref in stand.states.values())

    def is_at_head(self, stand: StateLost) -> bool:
        return all(HEAD in self.places.get(ref.key, ()) for ref in stand.states.values())

    def drop(self, key: str, place: int) -> bool:
        """A state is at `place` no longer; whether it was there."""
        places = self.places.get(key, set())
        was_there = place in places
        places.discard(place)
        if not places:
            self.places.pop(key, None)
        return was_there


class Copies:
    """Books of the states that tasks left on nodes, and of their copies at the head."""

    def __init__(self) -> None:
        self._courses: dict[str, _Course] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether a task was started for it, and it was not forgotten since."""
        return request_id in self._courses

    def start(self, work: Work) -> None:
        """A task starts from here. What a request brings to its first task was put into the head's store."""
        request_id = work.request.request_id
        if request_id not in self._courses:
            stand = StateLost(request_id, work.stage_index, work.steps_done, work.states)
            places = {ref.key: {HEAD} for ref in work.states.values()}
            self._courses[request_id] = _Course([stand], places)

    def finish(self, work: Work, stage: str, result: Result, node: int) -> None:
        """A task that started with `work` has left `result` on `node`, where it takes the place of what was before."""
        request_id = work.request.request_id
        course = self._courses.get(request_id)
        if course is None:
            return
        after = work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        states = {**work.states, stage: result.left}
        course.places.setdefault(result.left.key, set()).add(node)
        if (replaced := work.states.get(stage)) is not None:
            course.drop(replaced.key, node)
        course.stands.append(StateLost(request_id, after.stage_index, after.stage_steps_done, states))

    def arrive(self, request_id: str, key: str, place: int) -> list[TensorRef]:
        """A copy is at `place` now. The answer is what the head needs no longer."""
        course = self._courses[request_id]
        course.places.setdefault(key, set()).add(place)
        newest = max((i for i, stand in enumerate(course.stands) if course.is_at_head(stand)), default=0)
        old, course.stands = course.stands[:newest], course.stands[newest:]
        needed = {ref.key for stand in course.stands for ref in stand.states.values()}
        dropped = {ref.key: ref for stand in old for ref in stand.states.values() if ref.key not in needed}
        return [ref for name, ref in dropped.items() if course.drop(name, HEAD)]

    def places(self, request_id: str, key: str) -> frozenset[int]:
        """Where a state is, as far as it is known."""
        course = self._courses.get(request_id)
        return frozenset() if course is None else frozenset(course.places.get(key, ()))

    def lose(self, node: int) -> list[StateLost]:
        """Remove the copies on `node`, which is lost. A request whose newest state had no other copy goes back to the
        last step that has one; the answer is those steps."""
        back = []
        for course in self._courses.values():
            for key in list(course.places):
                course.drop(key, node)
            newest = course.stands[-1]
            while len(course.stands) > 1 and not course.is_there(course.stands[-1]):
                course.stands.pop()
            if course.stands[-1] is not newest:
                back.append(course.stands[-1])
        return back

    def forget(self, request_id: str) -> None:
        self._courses.pop(request_id, None)
