"""Pictures that come with requests: as values, and in the store."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tetriserve.core.events import Checkpoint
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import INPUT
from tetriserve.core.states import StateStore

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class InputPicture:
    """`data` is RGB, 8 bits, row by row: 3 bytes for each pixel of `shape`."""

    shape: Shape
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, pixels: np.ndarray) -> InputPicture:
        """Of uint8, (height, width, 3).

        Raises:
            ValueError: `pixels` are not.
        """
        if pixels.dtype != "uint8" or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"pixels are {pixels.dtype}, {pixels.shape}; they must be uint8, (height, width, 3)")
        return cls(Shape(*pixels.shape[:2]), pixels.tobytes())

    @property
    def digest(self) -> str:
        """Hexadecimal; equal for equal pictures."""
        return hashlib.blake2b(f"{self.shape}\0".encode() + self.data, digest_size=16).hexdigest()


def put_pictures(states: StateStore, request: Request, pictures: Sequence[InputPicture]) -> Checkpoint:
    """Leave them in the store, and return where the request begins. It waits for the store.

    Raises:
        OSError: there is no room.
    """
    import numpy as np
    from safetensors.numpy import save

    arrays = {
        str(number): np.frombuffer(each.data, np.uint8).reshape(each.shape.height, each.shape.width, 3)
        for number, each in enumerate(pictures)
    }
    # A client may name its request, and by mistake as another that is about to be admitted.
    ref = states.put(f"{request.request_id}.{INPUT}.{uuid.uuid4().hex}", save(arrays))
    return Checkpoint(0, 0, {INPUT: ref}, ())
