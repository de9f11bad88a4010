"""How log lines look: text for a person, or one JSON object per line for a machine."""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

MAX_FIELD_CHARS = 400
"""Of a field's text: clients choose some of it."""


def set_up_logging(level: str, log_format: str, *, rank: int | None = None) -> None:
    """Log to stderr from now on, warnings and uncaught exceptions included. `rank` is said on every line of a worker.

    A worker replaces what its process inherited; elsewhere handlers that are there already stay the only ones.
    """
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(rank))
    else:
        who = "" if rank is None else f"rank {rank} "
        handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=rank is not None)
    warnings.showwarning = _log_warning
    sys.excepthook = _log_uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def adopt_loggers(*quiet: str) -> None:
    """Have libraries that write to stderr by handlers of their own write by ours, and those named only errors."""
    for name in [*logging.root.manager.loggerDict]:
        logger = logging.getLogger(name)
        for handler in [*logger.handlers]:
            if type(handler) is logging.StreamHandler:  # a subclass does something else, such as torch's traces
                logger.removeHandler(handler)
                logger.propagate = True
    for name in quiet:
        logging.getLogger(name).setLevel(logging.ERROR)


def writes_json() -> bool:
    """Whether this process logs for machines, so that nothing else may be written to stderr."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object, **others: object
) -> None:
    text = " ".join(str(message).split())
    logging.getLogger("py.warnings").warning("%s: %s (%s:%d)", category.__name__, text, filename, lineno)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, KeyboardInterrupt):
        logging.getLogger(__name__).critical("uncaught %s", kind.__name__, exc_info=(kind, error, traceback))


def fields(**values: object) -> dict[str, Any]:
    """What a line says to machines beyond its message; pass it as `extra`.

    `request_id` is an HTTP exchange's, in every line. Requests of the engine are `image_ids`, with commas.
    """
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """One JSON object per record, in ASCII: time (UTC), level, logger, message, what `fields` added, traceback."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self._common: dict[str, object] = {} if rank is None else {"rank": rank}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._common,
        }
        for name, value in getattr(record, "fields", {}).items():
            line[name] = value[:MAX_FIELD_CHARS] if isinstance(value, str) else value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
