"""Facts about trajectories that hold from one event to the next, worked out once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from tetriserve.core.plan import State
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory

Terms = TypeVar("Terms")
Fact = TypeVar("Fact")


class Facts(Generic[Terms, Fact]):
    """What `derive` makes of each trajectory, remembered for as long as the trajectory and its terms stay the same.

    Terms are what the cost model and the pool say about a kind of request (`Request.kind`). Most of a long queue is the
    same at the next event, so that only looking it up is left. Both functions are pure: what is remembered is never a
    decision, and a policy that forgot it all would plan the same.
    """

    def __init__(
        self, terms_of: Callable[[Request, State], Terms], derive: Callable[[Trajectory, Terms], Fact]
    ) -> None:
        self._terms_of = terms_of
        self._derive = derive
        self._kinds: dict[tuple[object, ...], _Kind[Terms]] = {}
        self._known: dict[int, _Known[Terms, Fact]] = {}

    def of(self, trajectories: Iterable[Trajectory], state: State) -> list[Fact]:
        """One fact per trajectory, in the same order. Others are forgotten."""
        before, self._known = self._known, {}
        renewed: set[_Kind[Terms]] = set()
        facts = []
        for trajectory in trajectories:
            # A trajectory is a value that nobody mutates, and `_Known` keeps it alive: its identity is its name.
            name = id(trajectory)
            known = before.get(name)
            kind = known.kind if known is not None else self._kind_of(trajectory.request)
            if kind not in renewed:
                kind.renew(self._terms_of(trajectory.request, state))
                renewed.add(kind)
            if known is None:
                known = _Known(trajectory, kind, self._derive(trajectory, kind.terms))
            elif known.terms is not kind.terms:
                known.terms, known.fact = kind.terms, self._derive(trajectory, kind.terms)
            self._known[name] = known
            facts.append(known.fact)
        if len(self._kinds) > len(renewed):
            self._kinds = {key: kind for key, kind in self._kinds.items() if kind in renewed}
        return facts

    def _kind_of(self, request: Request) -> _Kind[Terms]:
        return self._kinds.setdefault(request.kind, _Kind())


class _Kind(Generic[Terms]):
    """Requests with the same terms. Equal terms stay the same object, which is quick to compare."""

    terms: Terms

    def renew(self, terms: Terms) -> None:
        if getattr(self, "terms", None) != terms:
            self.terms = terms


class _Known(Generic[Terms, Fact]):
    """A fact and what it rests on. Changed in place, so that the old fact goes at once: a long queue would otherwise
    leave thousands of objects per event to the garbage collector."""

    __slots__ = ("fact", "kind", "terms", "trajectory")

    def __init__(self, trajectory: Trajectory, kind: _Kind[Terms], fact: Fact) -> None:
        self.trajectory = trajectory
        self.kind = kind
        self.terms = kind.terms
        self.fact = fact
