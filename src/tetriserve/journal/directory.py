"""The journal's directory: one owner at a time, private to its user, with files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from tetriserve.core.errors import ConfigError
from tetriserve.files import read_bounded
from tetriserve.journal.records import Checksum, Corrupt, KeptFile, checksum_of

DATABASE = "journal.sqlite3"
_COMMITS = "commits"
_MAX_DIGITS = 20
_PIECE_BYTES = 2**20
_FOLDER = "tensors"
_OURS = re.compile(r"[^/]+\.(\w+\.\d+\.\d+|pixels|mp4|jpg|embeds|latents\.\d+)(\.tmp)?")
"""Names that may be removed, earlier versions' too: an operator's own files may lie in the same place."""


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
            for folder in (path, self._folder):
                if not os.access(folder, os.W_OK | os.X_OK):  # to try it needs room, and a full disk has none
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"journal {path} cannot be written: {error.strerror}; name another directory") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(f"journal {path} is in use by another server; name another directory") from None
        self._commits: int | None = None

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
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # where there is no room, half a file takes what is left
            raise
        sync_folder(self._folder)
        return KeptFile(name, len(data), checksum_of(data))

    def read(self, file: KeptFile) -> bytes:
        """
        Raises:
            Corrupt: it is not what was written.
        """
        try:
            data = read_bounded(self._folder / file.name, file.num_bytes)
        except OSError as error:
            raise Corrupt(f"file {file.name} cannot be read: {error.strerror}") from None
        if len(data) != file.num_bytes or checksum_of(data) != file.checksum:
            raise Corrupt(f"file {file.name} does not match its checksum")
        return data

    def path_of(self, file: KeptFile) -> Path:
        return self._folder / file.name

    def open(self, file: KeptFile) -> BinaryIO:
        """To be read from its beginning, as often as it is needed, and never in memory as a whole.

        Raises:
            Corrupt: it is not what was written.
        """
        checksum, num_bytes = Checksum(), 0
        try:
            opened = self.path_of(file).open("rb")
        except OSError as error:
            raise Corrupt(f"file {file.name} cannot be read: {error.strerror}") from None
        try:
            while piece := opened.read(_PIECE_BYTES):
                checksum.update(piece)
                num_bytes += len(piece)
            if num_bytes != file.num_bytes or checksum.text != file.checksum:
                raise Corrupt(f"file {file.name} does not match its checksum")
            opened.seek(0)
        except OSError as error:
            opened.close()
            raise Corrupt(f"file {file.name} cannot be read: {error.strerror}") from None
        except BaseException:
            opened.close()
            raise
        return opened

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):  # an orphan is removed at the next start
            (self._folder / name).unlink()

    def remove_orphans(self, wanted: Collection[str]) -> None:
        """Remove what a server left behind that nothing refers to."""
        for path in self._folder.iterdir():
            if path.name not in wanted and _OURS.fullmatch(path.name):
                self.remove(path.name)

    def read_commits(self) -> int | None:
        """The number that was noted last; None if there is none that can be read."""
        try:
            return int(read_bounded(self.path / _COMMITS, _MAX_DIGITS))
        except (OSError, ValueError):
            return None

    def note_commits(self, number: int) -> None:
        """Note how many commits there are, beside the database: a log that loses some of them does not show it.

        It is not made to last: after a power failure the number may be too small, and then it proves nothing.
        """
        with contextlib.suppress(OSError):
            if self._commits is None:
                self._commits = os.open(self.path / _COMMITS, os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(self._commits, f"{number:0{_MAX_DIGITS}}".encode(), 0)

    def release(self) -> None:
        for descriptor in (self._lock, self._commits):
            if descriptor is not None:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make what was renamed in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
