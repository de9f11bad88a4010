"""What a rank keeps of requests in its own memory: never the only copy, so that any of it may go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetriserve.models.adapter import Tensors


@dataclass
class Resident:
    """One request's states as this rank has them, by kind of stage. `memo`: see `models.adapter.Member`."""

    tensors: dict[str, Tensors] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict)

    def key(self, stage: str) -> str | None:
        """Under which its state is in the store; None if this rank does not have it."""
        return self._keys.get(stage)

    def hold(self, stage: str, key: str, tensors: Tensors) -> None:
        self.tensors = {**self.tensors, stage: tensors}  # a task that runs goes on with those it began with
        self._keys[stage] = key

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


class Residents:
    """The requests that a rank has states of; over `max_bytes`, those go that were used least recently."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._residents: OrderedDict[str, Resident] = OrderedDict()

    def of(self, request_id: str) -> Resident:
        resident = self._residents.setdefault(request_id, Resident())
        self._residents.move_to_end(request_id)
        return resident

    def forget(self, request_id: str) -> None:
        self._residents.pop(request_id, None)

    def clear(self) -> None:
        self._residents.clear()

    def evict(self, keep: Collection[str]) -> None:
        """Bring the rest within the limit; of `keep`, the members of the last task, nothing goes."""
        num_bytes = sum(resident.num_bytes for resident in self._residents.values())
        for request_id, resident in [*self._residents.items()]:
            if num_bytes <= self._max_bytes:
                return
            if request_id not in keep:
                num_bytes -= resident.num_bytes
                del self._residents[request_id]

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._residents
