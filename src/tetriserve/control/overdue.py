"""What the pool owes to requests whose deadlines have passed: a share of its time, so that none waits for ever."""

from __future__ import annotations

from tetriserve.policies.overdue import INSTALMENT_S, OVERDUE_S


class LateAccount:
    """Rank-seconds that the request longest overdue may take before requests that can still be in time.

    Credit accrues at `share` of the pool's rank time while a request is overdue. Tasks of the one that is longest
    overdue are charged to it, also when they run on ranks that nothing else wanted: to that request the share is a
    minimum, not an addition. What other late requests get on idle ranks is not charged. A balance is overdrawn by one
    task of any length, and by no more.
    """

    def __init__(self, share: float) -> None:
        """
        Args:
            share: of the pool's rank time, from 0 (no credit ever) to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"late share is {share:g}; it must be between 0 and 1")
        self._share = share
        self._until_s = 0.0
        self.balance_s = 0.0

    def fork(self) -> LateAccount:
        """An equal account that goes its own way from here."""
        forked = LateAccount(self._share)
        forked._until_s, forked.balance_s = self._until_s, self.balance_s
        return forked

    def accrue(self, now: float, num_ranks: int, first_deadline_s: float) -> None:
        """Take in the time since the last call.

        Args:
            first_deadline_s: the earliest deadline of all unfinished requests that living ranks can run; infinity for
                none.
        """
        overdue_from_s = first_deadline_s + OVERDUE_S
        if overdue_from_s >= now:
            self.balance_s = 0.0
        else:
            elapsed_s = now - max(self._until_s, overdue_from_s)
            self.balance_s = min(self.balance_s + self._share * num_ranks * elapsed_s, INSTALMENT_S)
        self._until_s = now

    def charge(self, rank_s: float, deadline_s: float, now: float, first_deadline_s: float) -> None:
        """A task of `rank_s` rank-seconds starts for the request with `deadline_s`; see the class for what it costs."""
        if deadline_s <= first_deadline_s and deadline_s + OVERDUE_S < now:
            self.balance_s = max(self.balance_s - rank_s, -rank_s)
