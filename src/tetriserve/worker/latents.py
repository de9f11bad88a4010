"""The tensor store: the copy of each request's state that outlives any one worker.

A directory in memory (tmpfs) of safetensors files, written whole and renamed into place. The leader of a task leaves
its result here; ranks that lack a request's state read it; the server reads pixels. The same copy is the checkpoint
from which a request continues when a worker dies, and the way latents move between groups: no transfer ever needs
the rank that computed them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetriserve.core.events import TensorRef

if TYPE_CHECKING:
    import numpy as np
    import torch

_SHM = Path("/dev/shm")  # noqa: S108
_MIN_SHM_BYTES = 2**30
_PREFIX = "tetriserve-store-"
_LOCK = "lock"
_NUMPY_DTYPES = {"U8": "uint8", "F16": "float16", "F32": "float32", "F64": "float64"}


class TensorStore:
    """Named sets of tensors under `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> TensorRef:
        """Keep a host copy of `tensors` under `key`; readers see the old whole or the new whole."""
        from safetensors.torch import save_file

        with self._whole_file(key) as file:
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file)
        return TensorRef(key, self._path(key).stat().st_size)

    def load(self, ref: TensorRef, device: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        tensors: dict[str, torch.Tensor] = load_file(self._path(ref.key), device=device)
        return tensors

    def load_numpy(self, ref: TensorRef) -> dict[str, np.ndarray]:
        """Without torch, for the server. bfloat16, which numpy does not have, comes as float32."""
        from safetensors import deserialize

        return {name: _array(view) for name, view in deserialize(self._path(ref.key).read_bytes())}  # type: ignore[no-untyped-call]

    def read(self, ref: TensorRef) -> bytes:
        """The file as it is.

        Raises:
            OSError: it is gone.
        """
        return self._path(ref.key).read_bytes()

    def put(self, key: str, data: bytes) -> TensorRef:
        """Take back under `key` what `read` gave, maybe from another store.

        Raises:
            OSError: there is no room for it.
        """
        with self._whole_file(key) as file:
            file.write_bytes(data)
        return TensorRef(key, len(data))

    def drop(self, ref: TensorRef) -> None:
        self._path(ref.key).unlink(missing_ok=True)

    def drop_request(self, request_id: str) -> None:
        """Drop whatever any task of the request left, also what nobody refers to because its task failed."""
        for path in self._directory.glob(f"{request_id}.*"):
            path.unlink(missing_ok=True)

    @contextmanager
    def _whole_file(self, key: str) -> Iterator[Path]:
        """A file to write, which then is there under `key` as a whole, or not at all."""
        temporary = self._path(f"{key}.{os.getpid()}.tmp")
        try:
            yield temporary
            os.replace(temporary, self._path(key))
        except BaseException:
            temporary.unlink(missing_ok=True)  # where there is no room, half a file takes what is left
            raise

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.safetensors"


class StoreDirectory:
    """A store's directory for the life of one server, in memory where there is enough of it.

    The owner holds a lock in it. What a killed server left behind is nobody's, so it can be locked, and the next
    server on this host removes it.
    """

    def __init__(self) -> None:
        parent = _parent()
        for stale in parent.glob(f"{_PREFIX}*"):
            _remove_if_stale(stale)
        unnamed = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = (unnamed / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unnamed.rename(parent / unnamed.name.removeprefix("."))  # locked before anybody looks for it

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _array(view: Mapping[str, Any]) -> np.ndarray:
    """One tensor as safetensors describes it: dtype, shape and bytes."""
    import numpy as np

    kind, data = view["dtype"], view["data"]
    if kind == "BF16":  # the upper half of a float32
        array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        array = np.frombuffer(data, _NUMPY_DTYPES[kind])
    return array.reshape(view["shape"])


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
