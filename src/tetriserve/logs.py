"""How log lines look: text for a person, or one JSON object per line for a machine."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

MAX_FIELD_CHARS = 400
"""Of a field's text: clients choose some of it."""


def set_up_logging(level: str, log_format: str, *, rank: int | None = None) -> None:
    """Log to stderr from now on. `rank` is said on every line of a worker."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(rank))
    else:
        who = "" if rank is None else f"rank {rank} "
        handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def fields(**values: object) -> dict[str, Any]:
    """What a line says to machines beyond its message; pass it as `extra`."""
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
