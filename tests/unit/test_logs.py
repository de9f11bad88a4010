"""Log lines for machines: one JSON object each, whatever is logged."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from tetriserve.logs import JsonFormatter, fields


def formatted(message: str, *arguments: object, exc_info: Any = None, rank: int | None = None, **extra: object) -> str:
    record = logging.LogRecord("tetriserve.test", logging.WARNING, __file__, 1, message, arguments, exc_info)
    record.created = 1_000_000_000.25
    if extra:
        record.__dict__.update(fields(**extra))
    return JsonFormatter(rank).format(record)


def test_a_line_is_an_object_with_time_level_logger_message_and_fields() -> None:
    assert json.loads(formatted("%s of %d", "one", 2, request_id="r1", status=200, elapsed_s=0.5)) == {
        "time": "2001-09-09T01:46:40.250+00:00",
        "level": "warning",
        "logger": "tetriserve.test",
        "message": "one of 2",
        "request_id": "r1",
        "status": 200,
        "elapsed_s": 0.5,
    }


def test_a_workers_line_names_its_rank() -> None:
    assert json.loads(formatted("x", rank=3))["rank"] == 3


def test_what_clients_chose_stays_on_one_line_and_short() -> None:
    line = formatted("%s", "a\nb\u2028\ud800", path="/" + "x" * 9999)
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\nb\u2028\ud800"
    assert len(json.loads(line)["path"]) == 400


def test_a_traceback_is_a_field() -> None:
    try:
        raise ZeroDivisionError("by design")
    except ZeroDivisionError:
        line = formatted("it broke", exc_info=sys.exc_info())
    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ZeroDivisionError: by design")


def lines_of(code: str, *, log_format: str = "json") -> list[str]:
    """What a process writes to stderr that sets logging up and runs `code`."""
    code = f"from tetriserve.logs import *; set_up_logging('info', {log_format!r}, rank=1)\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()


WAYS = {
    "a warning": "import warnings; warnings.warn('careful\\nnow', stacklevel=2)",
    "an uncaught exception": "raise ValueError('careful')",
    "an uncaught exception of a thread": (
        "import threading\ndef fail(): raise ValueError('careful')\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()"
    ),
    "an exception of a finalizer": "class A:\n def __del__(self): raise ValueError('careful')\nA()",
    "a library with a handler of its own": (
        "import logging; log = logging.getLogger('library'); log.addHandler(logging.StreamHandler())\n"
        "log.propagate = False; adopt_loggers(); log.warning('careful')"
    ),
    "an operator's mistake": (
        "from tetriserve.core.errors import ConfigError; from tetriserve.options import one_line_errors\n"
        "import contextlib\nwith contextlib.suppress(Exception), one_line_errors(): raise ConfigError('careful')"
    ),
}


@pytest.mark.parametrize("code", WAYS.values(), ids=WAYS)
def test_whatever_a_process_has_to_say_is_one_object_on_one_line(code: str) -> None:
    (line,) = lines_of(code)
    said = json.loads(line)
    assert "careful" in said["message"] + said.get("traceback", "")
    assert said["rank"] == 1


def test_a_library_that_quotes_clients_logs_errors_alone() -> None:
    code = (
        "log = logging.getLogger('library.part'); root = logging.getLogger('library')\n"
        "root.addHandler(logging.StreamHandler()); root.setLevel('WARNING'); root.propagate = False\n"
        "adopt_loggers('library'); log.warning('truncated: a secret'); log.error('it broke')"
    )
    (line,) = lines_of(code)
    assert json.loads(line)["message"] == "it broke"


def test_a_warning_in_text_is_one_line_with_its_time_and_rank() -> None:
    (line,) = lines_of(WAYS["a warning"], log_format="text")
    assert re.match(r"\d{4}-\d\d-\d\d .* rank 1 WARNING UserWarning: careful now", line)


def test_once_set_up_every_logger_writes_such_lines_to_stderr() -> None:
    code = (
        "import logging; from tetriserve.logs import set_up_logging\n"
        "set_up_logging('info', 'json', rank=1)\n"
        "logging.getLogger('elsewhere').warning('careful'); logging.getLogger('elsewhere').debug('no')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert json.loads(line) | {"time": ""} == {
        "time": "", "level": "warning", "logger": "elsewhere", "message": "careful", "rank": 1
    }  # fmt: skip
