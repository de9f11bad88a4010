"""The journal's directory: one owner at a time, private to its user, with files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Collection
from pathlib import Path

from tetriserve.core.errors import ConfigError
from tetriserve.journal.records import Corrupt, KeptFile, checksum_of

DATABASE = "journal.sqlite3"
_LOCK = "lock"
_FOLDER = "tensors"
_OURS = re.compile(r"[^/]+\.(embeds|latents\.\d+|pixels)(\.tmp)?")
"""Names that may be removed: an operator's own files may lie in the same place."""


class Directory:
    """`path`, held until `release`. Files are named without their folder.

    Raises:
        ConfigError: another server holds it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = path / _FOLDER
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            probe = self._folder / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"journal {path} cannot be written: {error.strerror}; name another directory") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(f"journal {path} is in use by another server; name another directory") from None

    @property
    def database(self) -> Path:
        return self.path / DATABASE

    def write(self, name: str, data: bytes) -> KeptFile:
        """On disk, whole and under its name, when this returns.

        Raises:
            OSError: it cannot be written.
        """
        path, temporary = self._folder / name, self._folder / f"{name}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(self._folder)
        return KeptFile(name, len(data), checksum_of(data))

    def read(self, file: KeptFile) -> bytes:
        """
        Raises:
            Corrupt: it is not what was written.
        """
        try:
            data = (self._folder / file.name).read_bytes()
        except OSError as error:
            raise Corrupt(f"file {file.name} cannot be read: {error.strerror}") from None
        if len(data) != file.num_bytes or checksum_of(data) != file.checksum:
            raise Corrupt(f"file {file.name} does not match its checksum")
        return data

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):  # an orphan is removed at the next start
            (self._folder / name).unlink()

    def remove_orphans(self, wanted: Collection[str]) -> None:
        """Remove what a server left behind that nothing refers to."""
        for path in self._folder.iterdir():
            if path.name not in wanted and _OURS.fullmatch(path.name):
                self.remove(path.name)

    def release(self) -> None:
        os.close(self._lock)


def sync_folder(folder: Path) -> None:
    """Make what was renamed in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
