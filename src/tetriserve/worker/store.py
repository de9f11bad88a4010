"""The tensor store: the copy of each request's state that outlives any one worker.

A directory in memory (tmpfs) of safetensors files, written whole and renamed into place. The leader of a task leaves
its result here; ranks that lack a request's state read it; the server reads what is finished. The same copy is the
checkpoint from which a request continues when a worker dies, and the way latents move between groups: no transfer ever
needs the rank that computed them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tetriserve.core.events import TensorRef
from tetriserve.core.states import StateGone, StoreError
from tetriserve.worker.bundle import no_panics

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SHM = Path("/dev/shm")  # noqa: S108
_MIN_SHM_BYTES = 2**30
_PREFIX = "tetriserve-store-"
_LOCK = "lock"
_ROOM_TIMEOUT_S = 5.0
_LOOK_S = 0.1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SUFFIX = ".safetensors"
_MAPPED_BYTES = 2**20
"""Smaller files are read, which takes some 50 us less than to map them; from about here on it would take more."""
_UNFINISHED = ".tmp"


class TensorStore:
    """A `core.states.StateStore` in `directory`; workers save and load its bundles as tensors."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> TensorRef:
        """Keep a host copy of `tensors` under `key`; readers see the old whole or the new whole.

        Blocks for seconds while the store is full: requests that end make room.

        Raises:
            StoreError: there is no room, or no directory.
        """
        from safetensors.torch import save_file

        copies = _on_host(tensors)
        give_up_at = time.monotonic() + _ROOM_TIMEOUT_S
        while True:
            try:
                with self._whole_file(key) as file, no_panics():
                    save_file(copies, file)
                return TensorRef(key, self._path(key).stat().st_size)
            except Exception as error:  # safetensors has errors of its own, for what the disk has too
                number = error_number(error)
                if number == errno.ENOENT:
                    raise StoreError(number, "the tensor store was removed") from error
                if number not in _NO_ROOM:
                    raise
                if time.monotonic() > give_up_at:
                    raise StoreError(number, "the tensor store is full") from error
            time.sleep(_LOOK_S)  # blocks the task's thread alone: heartbeats have a thread of their own

    def load(self, ref: TensorRef, device: str) -> dict[str, torch.Tensor]:
        """Raises StateGone where it has been removed."""
        from safetensors.torch import load, load_file

        path = self._path(ref.key)
        try:
            with no_panics():
                is_mapped = ref.num_bytes >= _MAPPED_BYTES
                tensors: dict[str, torch.Tensor] = load_file(path) if is_mapped else load(path.read_bytes())
        except FileNotFoundError as error:
            raise _gone() from error
        if device == "cpu":
            return tensors
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}

    def put(self, key: str, data: bytes) -> TensorRef:
        with self._whole_file(key) as file:
            file.write_bytes(data)
        return TensorRef(key, len(data))

    def get(self, ref: TensorRef) -> bytes:
        try:
            return self._path(ref.key).read_bytes()
        except FileNotFoundError as error:
            raise _gone() from error

    def drop(self, ref: TensorRef) -> None:
        self._path(ref.key).unlink(missing_ok=True)

    def copy(self, ref: TensorRef, key: str) -> TensorRef:
        """A second name of the same file: files are replaced, and never written to again."""
        try:
            with self._whole_file(key) as file:
                os.link(self._path(ref.key), file)
        except FileNotFoundError as error:
            raise _gone() from error
        return TensorRef(key, self._path(key).stat().st_size)

    def list(self, request_id: str) -> tuple[TensorRef, ...]:
        refs = []
        for path in sorted(self._directory.glob(f"{request_id}.*{_SUFFIX}")):
            key = path.name.removesuffix(_SUFFIX)
            if not key.endswith(_UNFINISHED):
                with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                    refs.append(TensorRef(key, path.stat().st_size))
        return tuple(refs)

    def drop_request(self, request_id: str) -> None:
        """Drop whatever any task of the request left, also what nobody refers to because its task failed."""
        for path in self._directory.glob(f"{request_id}.*"):
            path.unlink(missing_ok=True)

    @contextmanager
    def _whole_file(self, key: str) -> Iterator[Path]:
        """A file to write, which then is there under `key` as a whole, or not at all."""
        temporary = self._path(f"{key}.{os.getpid()}{_UNFINISHED}")
        try:
            yield temporary
            os.replace(temporary, self._path(key))
        finally:
            # Half a file takes what room is left; and a second name of the same file is not renamed by the system.
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}{_SUFFIX}"


class StoreDirectory:
    """A directory for the life of one server: a store's, in memory where there is enough of it.

    The owner holds a lock in it. What a killed server left behind is nobody's, so it can be locked, and the next
    server on this host removes it.
    """

    def __init__(self, parent: Path | None = None, prefix: str = _PREFIX) -> None:
        """`parent` and `prefix` of its name are those of a store where none are named."""
        parent = parent or _parent()
        for stale in parent.glob(f"{prefix}*"):
            _remove_if_stale(stale)
        unnamed = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        self._lock = _locked(unnamed)
        self.path = unnamed.rename(parent / unnamed.name.removeprefix("."))  # locked before anybody looks for it

    def restore(self) -> None:
        """Make it again if somebody has removed it: a cleaner of temporary files, or a login session that ended."""
        if self.path.exists():
            return
        logger.error("the directory %s was removed, with all that was in it; it is made again", self.path)
        with contextlib.suppress(OSError):  # it is tried again
            self.path.mkdir(mode=0o700)
            self._lock.close()
            self._lock = _locked(self.path)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors of one device; from a GPU all at once, through memory that it can write to itself (pinned)."""
    import torch

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if not any(tensor.is_cuda for tensor in whole.values()):
        return whole
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in whole.items()
    }
    torch.cuda.synchronize()
    return copies


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, also where safetensors tells it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _gone() -> StateGone:
    return StateGone(errno.ENOENT, "a copy was removed from the tensor store")


def _locked(directory: Path) -> TextIO:
    lock = (directory / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _parent() -> Path:
    """Shared memory, unless it is small (containers often give 64 MB): then the usual temporary directory."""
    if _SHM.is_dir() and os.access(_SHM, os.W_OK) and shutil.disk_usage(_SHM).free >= _MIN_SHM_BYTES:
        return _SHM
    return Path(tempfile.gettempdir())


def _remove_if_stale(directory: Path) -> None:
    try:
        with (directory / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # its owner lives, or it is being made at this moment, or it is another user's
    shutil.rmtree(directory, ignore_errors=True)
