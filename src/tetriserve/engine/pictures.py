"""Pictures that come with requests: as values, and on their way into the store."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tetriserve.core.errors import InvalidRequest, QueueFull
from tetriserve.core.events import Checkpoint, Submitted
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import INPUT
from tetriserve.core.states import StateStore

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_BYTES = 2**30
"""Of the pictures of all unfinished requests: room in the store is every request's."""
_ROOM_RETRY_S = 1.0


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

    @classmethod
    def of_image(cls, image: Image.Image) -> InputPicture:
        """Of any mode: turned upright as its EXIF says, and what is transparent laid on white.

        Raises: an error of Pillow, of any class: the file cannot be decoded.
        """
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        elif image.mode.startswith("I;16"):  # 16 bits of grey, which Pillow would cut off at 255
            image = image.convert("I").point(lambda level: level / 257).convert("L")
        image = image.convert("RGB")
        return cls(Shape(image.height, image.width), image.tobytes())

    @property
    def digest(self) -> str:
        """Hexadecimal; equal for equal pictures."""
        return hashlib.blake2b(f"{self.shape}\0".encode() + self.data, digest_size=16).hexdigest()


def num_bytes_of(requests: Iterable[Request]) -> int:
    """Of the pictures that came with `requests`."""
    return sum(3 * image.num_pixels for request in requests for image in request.images)


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


class PictureEntrance:
    """Brings the pictures of arriving requests into `states`, `max_bytes` of all unfinished requests at most."""

    def __init__(self, states: StateStore, max_bytes: int = MAX_BYTES) -> None:
        self._states = states
        self._max_bytes = max_bytes
        self._num_arriving = 0

    @asynccontextmanager
    async def brought(
        self, arriving: Sequence[Submitted], pictures: Sequence[Sequence[InputPicture]], unfinished: Iterable[Request]
    ) -> AsyncIterator[list[Submitted]]:
        """`arriving`, each with where it begins if it brings `pictures`. Should the block raise, they go again.

        Raises:
            InvalidRequest: there will never be room for them.
            QueueFull: there is none now.
        """
        num_bytes = num_bytes_of(event.request for event in arriving)
        if num_bytes == 0:
            yield [*arriving]
            return
        if num_bytes > self._max_bytes:
            raise InvalidRequest(
                f"image: the pictures that came along have {num_bytes} bytes as pixels, once for each image; allowed: "
                f"{self._max_bytes}",
                "image",
            )
        num_taken = self._num_arriving + num_bytes_of(unfinished)
        if num_taken + num_bytes > self._max_bytes:
            raise QueueFull(
                f"the pictures that came along have {num_bytes} bytes as pixels; those of unfinished requests have "
                f"{num_taken}, of at most {self._max_bytes}",
                _ROOM_RETRY_S,
            )
        ready: list[Submitted] = []
        self._num_arriving += num_bytes
        try:
            for event, each in zip(arriving, pictures, strict=True):
                ready.append(replace(event, checkpoint=await self._put(event.request, each)))
            yield ready
        except BaseException:
            for event in ready:
                self._drop(event.checkpoint)
            raise
        finally:
            self._num_arriving -= num_bytes

    async def _put(self, request: Request, pictures: Sequence[InputPicture]) -> Checkpoint | None:
        if not pictures:
            return None
        putting = asyncio.ensure_future(asyncio.to_thread(put_pictures, self._states, request, pictures))
        try:
            return await asyncio.shield(putting)
        except asyncio.CancelledError:
            putting.add_done_callback(self._drop_late)  # a thread cannot be cancelled
            raise
        except OSError as error:
            why = f"there is no room for the pictures that came along: {error.strerror}"
            raise QueueFull(why, _ROOM_RETRY_S) from error

    def _drop_late(self, putting: asyncio.Future[Checkpoint]) -> None:
        if not putting.cancelled() and putting.exception() is None:
            self._drop(putting.result())

    def _drop(self, begin: Checkpoint | None) -> None:
        for ref in () if begin is None else begin.states.values():
            self._states.drop(ref)
