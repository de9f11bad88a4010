"""The ranks that run one task together, as a model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class PeerLost(RuntimeError):
    """A member of the team died or failed, or the task was aborted."""


class Team(Protocol):
    """The members of the current task, in the order of its ranks. Every member makes the same calls in the same order.

    degree: number of members.
    index: this rank's place among them.
    """

    @property
    def degree(self) -> int: ...

    @property
    def index(self) -> int: ...

    def exchange(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], largest_bytes: int) -> None:
        """All-to-all: copy `sends[i]` to member i, and what member i sends to this rank into `receives[i]`.

        Args:
            sends: (B, tokens, ...) for each member, this one too; views at any strides.
            receives: views to fill, of the shapes and the dtype that the members send.
            largest_bytes: of what any member sends to any other; the same on all members.

        Raises:
            PeerLost: a member will not come; the team is of no use before the next task.
        """
        ...


def shares(total: int, degree: int) -> tuple[int, ...]:
    """How `total` tokens are divided among members: as evenly as possible, the first have one more.

    >>> shares(7, 3)
    (3, 2, 2)
    """
    return tuple(total // degree + (index < total % degree) for index in range(degree))
