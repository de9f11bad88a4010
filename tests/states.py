"""A `StateStore` in this process's memory, and bundles to put into it, without torch."""

from __future__ import annotations

import errno

import numpy as np
from safetensors.numpy import save

from tetriserve.core.events import TensorRef
from tetriserve.core.states import StateGone


class MemoryStates:
    """bundles: what there is, by key. gotten: the keys that were read, in order. has_room: what is put is taken."""

    def __init__(self, bundles: dict[str, bytes] | None = None) -> None:
        self.bundles = dict(bundles or {})
        self.gotten: list[str] = []
        self.has_room = True

    def put(self, key: str, data: bytes) -> TensorRef:
        if not self.has_room:
            raise OSError(errno.ENOSPC, "No space left on device", f"/dev/shm/store/{key}")
        self.bundles[key] = data
        return TensorRef(key, len(data))

    def get(self, ref: TensorRef) -> bytes:
        self.gotten.append(ref.key)
        try:
            return self.bundles[ref.key]
        except KeyError:
            raise StateGone(errno.ENOENT, "a copy was removed from the store") from None

    def drop(self, ref: TensorRef) -> None:
        self.bundles.pop(ref.key, None)

    def copy(self, ref: TensorRef, key: str) -> TensorRef:
        return self.put(key, self.get(ref))

    def list(self, request_id: str) -> tuple[TensorRef, ...]:
        keys = sorted(key for key in self.bundles if key.startswith(f"{request_id}."))
        return tuple([TensorRef(key, len(self.bundles[key])) for key in keys])


def bundle_of(**arrays: np.ndarray | np.generic) -> bytes:
    """As a worker leaves tensors."""
    return bytes(save({name: np.asarray(array, order="C") for name, array in arrays.items()}))
