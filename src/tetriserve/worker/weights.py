"""One copy of the model's weights for all ranks that compute on the CPU.

It takes the memory of one copy, and more of it stays in the cache that the cores share.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import mmap
import os
from collections.abc import Iterable

import torch

from tetriserve.worker.team.region import Region

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""That of torch's own memory: kernels may compute other bits where it differs."""
_MODEL_BYTES = 2**44
"""Of the file for each model. It takes the memory of what is written to it, so that places may lie far apart."""


def share_weights(weights: Iterable[torch.Tensor], region: Region, place: int = 0) -> None:
    """Move `weights`, of the pool's model at `place`, to memory that all ranks map. What a rank writes there is seen by
    that rank alone.

    The first rank to come puts them behind `region`, in the same file. A rank keeps its own copy of a tensor that has
    other bits in the file: the first rank died, memory ran out, or the checkpoint was replaced.
    """
    begin_at = region.num_bytes + place * _MODEL_BYTES
    whole = [tensor for tensor in weights if tensor.is_contiguous() and tensor.nbytes]
    ends = [*itertools.accumulate(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in whole)]
    try:
        with open(f"/proc/self/fd/{region.file}", "r+b") as file:  # opened anew: a lock is of what was opened
            fcntl.flock(file, fcntl.LOCK_EX)
            end = begin_at + ends[-1]
            if os.fstat(region.file).st_size < end:
                os.truncate(region.file, end)
            begin = os.lseek(region.file, begin_at, os.SEEK_HOLE) - begin_at  # of what is to write
            mapped = mmap.mmap(region.file, ends[-1], access=mmap.ACCESS_COPY, offset=begin_at)
            shared = torch.frombuffer(mapped, dtype=torch.uint8)
            for tensor, start in zip(whole, [0, *ends], strict=False):
                own = tensor.detach().reshape(-1).view(torch.uint8)
                if start >= begin:
                    file.seek(begin_at + start)
                    file.write(own.numpy().data)
                    file.flush()
                found = shared[start : start + own.numel()]
                if torch.equal(found, own):
                    tensor.data = found.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    except OSError as error:
        logger.warning("not all weights are shared with the other ranks: %s", error.strerror)
