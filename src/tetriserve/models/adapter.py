"""What a model family provides: its stages, each as one call, with parallelism applied from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tetriserve.models.team import Team

Tensors = Mapping[str, "torch.Tensor"]
"""What a stage leaves behind, by name; it moves between ranks as it is."""


@dataclass
class Member:
    """One request's part of a task, on one rank.

    steps_done: of the task's stage.
    states: what each kind of stage has left so far.
    memo: what the adapter keeps on this rank between tasks of the request, to save time; it may be gone at any time.
    """

    request: Request
    steps_done: int
    states: Mapping[str, Tensors]
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """What a task leaves of one member.

    text: comes with the stage that reads it, from families that can count it.
    cpu_s: processor time that threads of the adapter's own spent for it.
    """

    tensors: Tensors
    num_steps: int = 0
    is_stage_over: bool = True
    text: TextCount | None = None
    cpu_s: float = 0.0


class Adapter(Protocol):
    """One loaded checkpoint on one rank. Degree 1 is bit-identical to calling the diffusers pipeline."""

    @property
    def weights(self) -> Iterable[torch.Tensor]:
        """Of all its models, in the same order on every rank; their memory may be replaced before the first task."""
        ...

    def run(
        self,
        stage: str,
        members: Sequence[Member],
        num_steps: int,
        on_step: Callable[[], None],
        *,
        joins_passes: bool = False,
    ) -> Sequence[Left]:
        """One task: a short stage, or `num_steps` steps of one with steps, for every member, in their order.

        joins_passes: all passes of a step in one forward, by a family that can.

        Every member of the team returns the whole; of a decode its leader alone does, the others no tensors. `on_step`
        is called after each step, or part of a decode; it may raise, which ends the task. The members' states are left
        as they were: should the task fail, it is run again from them.

        Raises:
            ValueError: the family has no such stage.
        """
        ...

    def use_team(self, team: Team | None) -> None:
        """Divide the sequence, and the tiles of a decode, among the members of `team` from the next task on; None is
        degree 1, the bare model."""
        ...

    def latents_of(self, pixels: np.ndarray) -> torch.Tensor:
        """The latents that decode to `pixels`, as nearly as the model can: (1, S, C) by token, or (1, C, H, W)."""
        ...

    def held_bytes(self) -> Mapping[str, int]:
        """Of parameters and buffers, by component of the checkpoint; see `loading.held_bytes`."""
        ...
