"""Files that a user names: a pipe is not waited for, a device is not read, and no file fills the memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tetriserve.core.errors import ConfigError


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `max_bytes`; `strerror` says which.
    """
    if "\0" in str(path):  # `os.open` raises ValueError
        raise OSError(errno.EINVAL, "A name cannot hold a zero byte", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a pipe would be to wait for its other end
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        if status.st_size <= max_bytes:
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)  # it may have grown meanwhile
            if len(data) <= max_bytes:
                return data
        raise OSError(errno.EFBIG, f"Larger than {max_bytes} bytes", str(path))
    finally:
        os.close(descriptor)


def read_text(path: Path, what: str, max_bytes: int) -> str:
    """The text of a regular file. `what`: what the file is, for messages.

    Raises:
        ConfigError: as `read_bounded`, or it is not UTF-8; the message names the file.
    """
    try:
        return read_bounded(path, max_bytes).decode()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
