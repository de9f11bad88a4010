"""The one exception tree. Foreign errors are translated into it at the boundary where they enter."""

from __future__ import annotations

from tetriserve.core.events import FailureKind


class TetriServeError(Exception):
    """Root of every error that TetriServe raises on purpose."""


class ConfigError(TetriServeError, ValueError):
    """The operator's mistake at start: the message says what is wrong and how to mend it, in one line."""


class CheckpointError(ConfigError):
    """A model directory is missing, incomplete or of a class that no adapter serves."""


class ProfileError(ConfigError):
    """A profile cannot be read, contradicts itself, or lacks what was asked of it."""


class InvalidRequest(TetriServeError, ValueError):
    """A client's mistake in one request.

    Attributes:
        param: the offending field, as the interface spells it at which it was found: Python's names in the engine,
            HTTP's in the server. None when the whole body is at fault.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(InvalidRequest):
    """The request names a model that this server does not serve."""


class KeyReused(InvalidRequest):
    """The idempotency key stands for other work already."""


class QueueFull(TetriServeError):
    """Admission refused because `max_queue` requests are already waiting, or too many for their quotes."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineInfeasible(TetriServeError):
    """Admission refused under `deadline_policy: reject`: the deadline cannot be promised; see `core.forecast.Quote`.

    Attributes:
        earliest_deadline_s: seconds from now to the earliest deadline that could be promised; None if none was found.
        retry_after_s: seconds after which the same deadline is worth asking for again.
    """

    def __init__(self, message: str, earliest_deadline_s: float | None, retry_after_s: float) -> None:
        super().__init__(message)
        self.earliest_deadline_s = earliest_deadline_s
        self.retry_after_s = retry_after_s


class RequestFailed(TetriServeError):
    """An accepted request ended without an image; the message says why.

    Attributes:
        kind: of the failed task that ended it; None where another fault of the server did.
    """

    def __init__(self, message: str, kind: FailureKind | None = None) -> None:
        super().__init__(message)
        self.kind = kind


class UnknownVideo(TetriServeError):
    """The client has no video of this id, or none any more."""


class VideoNotReady(TetriServeError):
    """The video is not finished, and what was asked for needs it to be."""


class VideoFailed(TetriServeError):
    """The video has failed, and what was asked for needs it to be finished."""


class JournalError(TetriServeError):
    """The journal cannot keep what it must: nothing may be promised, or answered, on its strength."""


class ShuttingDown(TetriServeError):
    """The engine drains and admits nothing more."""
