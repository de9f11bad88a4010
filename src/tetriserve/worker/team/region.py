"""Memory that the executor and all ranks of a machine share. The executor reads it without torch.

Each rank has a word in which tasks are aborted, one that counts its exchanges, one for `worker.team.groups`, and two
slots for what it sends. An anonymous file (memfd) holds it: no name, no mount whose size limits it, and it is gone with
the last process that maps it. Behind the region, the file holds the weights of the model (`worker.weights`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from multiprocessing.reduction import DupFd
from typing import Any

from tetriserve.core.errors import ConfigError

SLOT_BYTES = 4 * 2**20
"""What exceeds a slot is exchanged in pieces. A few MB stay in the caches of the processor."""
_LINE_BYTES = 64
"""A word has a cache line of its own, or writes to its neighbours would slow those who wait for it."""
_WORDS_PER_LINE = _LINE_BYTES // 8
_COUNT_BITS = 24


class Region:
    """One process's view of it; pickled, it goes to a child process that is started.

    Words only grow, and each is written whole. `aborted[rank]` has several writers, which agree: see `abort`.

    file: its descriptor in this process.
    memory: the whole region.
    words: all its 64-bit words, by index.

    Raises:
        ConfigError: there is not enough memory for it; the message says how much is needed.
    """

    def __init__(self, num_ranks: int, slot_bytes: int = SLOT_BYTES) -> None:
        """slot_bytes: 0 where the ranks exchange their tensors by other means."""
        self._num_ranks, self.slot_bytes = num_ranks, slot_bytes
        try:
            self.file = os.memfd_create("tetriserve-team", os.MFD_CLOEXEC)
            os.posix_fallocate(self.file, 0, self.num_bytes)  # now, and not by a signal when it is first used
            self._map()
        except OSError as error:
            raise ConfigError(
                f"{num_ranks} ranks need {self.num_bytes / 2**20:.0f} MiB of shared memory for their exchanges: "
                f"{error.strerror}; use fewer --ranks"
            ) from error

    @property
    def num_bytes(self) -> int:
        """Whole pages."""
        return _whole_pages(self._slots_start + 2 * self._num_ranks * self.slot_bytes)

    def aborted(self, rank: int) -> int:
        """Index of the word with the highest token that is aborted for `rank`."""
        return rank * _WORDS_PER_LINE

    def progress(self, rank: int) -> int:
        """Index of the word with the last exchange that `rank` has given its part of; see `mark`."""
        return (self._num_ranks + rank) * _WORDS_PER_LINE

    def dropped(self, rank: int) -> int:
        """Index of the word with the token of the last task whose process group `rank` has dropped."""
        return (2 * self._num_ranks + rank) * _WORDS_PER_LINE

    def slot(self, rank: int, parity: int) -> int:
        """Offset in bytes of one of the two slots of `rank`."""
        return self._slots_start + (2 * rank + parity) * self.slot_bytes

    def abort(self, ranks: Iterable[int], token: int) -> None:
        """Free `ranks` from the task of this token and all before it, now or when they enter it.

        Writers of one word never differ in a way that matters: a rank has one task at a time, so that the executor and
        the task's members write the same token.
        """
        for rank in ranks:
            word = self.aborted(rank)
            self.words[word] = max(self.words[word], token)

    def close(self) -> None:
        """Let go of it, here; once more does nothing."""
        if not self.memory.closed:
            self.words.release()
            self.memory.close()
            os.close(self.file)

    def __getstate__(self) -> tuple[int, int, Any]:
        return self._num_ranks, self.slot_bytes, DupFd(self.file)

    def __setstate__(self, state: tuple[int, int, Any]) -> None:
        self._num_ranks, self.slot_bytes, duplicate = state
        self.file = duplicate.detach()
        self._map()

    @property
    def _slots_start(self) -> int:
        return _whole_pages(3 * self._num_ranks * _LINE_BYTES)

    def _map(self) -> None:
        self.memory = mmap.mmap(self.file, self.num_bytes)
        self.words = memoryview(self.memory).cast("Q")


def mark(token: int, count: int) -> int:
    """The word that says: exchange `count` of the task `token`. Of one task it grows, and from task to task."""
    return token << _COUNT_BITS | count


def token_of(word: int) -> int:
    return word >> _COUNT_BITS


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
