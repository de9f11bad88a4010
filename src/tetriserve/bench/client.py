"""One image request over HTTP: what is sent, and what is read from the answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tetriserve.bench.attempt import Attempt
from tetriserve.bench.check import error_message
from tetriserve.bench.connections import Answer, Connections, Unanswered
from tetriserve.core.events import Run
from tetriserve.core.plan import Task
from tetriserve.core.request import Request
from tetriserve.core.stages import image_stages
from tetriserve.workload.outcome import Outcome, Status

_PATH = "/v1/images/generations"
_LEAST_SLO_MS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """How requests are written.

    model: None sends none.
    sends_slo: send `slo_ms`, the time left until the deadline, for servers that plan with it.
    extra: further fields of the body; one that is None is left out even if it would be sent otherwise.
    images: a directory that takes every picture; None keeps none.
    """

    model: str | None
    timeout_s: float
    sends_slo: bool = True
    extra: Mapping[str, object]
    images: Path | None = None


class Client:
    """Sends requests and judges them by its own clock.

    start_s: the event loop's time from which arrivals, deadlines and finishes are counted.
    """

    def __init__(self, connections: Connections, wire: Wire, start_s: float) -> None:
        self._connections = connections
        self._wire = wire
        self._start_s = start_s

    async def draw(self, request: Request) -> Attempt:
        """Send one request now; its failure, whatever the kind, is an attempt too."""
        now = asyncio.get_running_loop().time
        sent_s = now() - self._start_s
        try:
            body = self._body(request, sent_s)
            answer = await self._connections.exchange("POST", _PATH, body, timeout_s=self._wire.timeout_s)
        except Unanswered as error:
            return _failed(request, sent_s, now() - self._start_s, error.kind, str(error))
        finish_s = answer.received_s - self._start_s
        if answer.status != 200:
            return _failed(request, sent_s, finish_s, f"http_{answer.status}", error_message(answer))
        try:
            picture = _picture(answer)
            if self._wire.images is not None:
                await asyncio.to_thread(_save, picture, self._wire.images / quote(request.request_id, safe=""))
        except ValueError as error:
            return _failed(request, sent_s, finish_s, "bad_answer", str(error))
        return _finished(request, sent_s, finish_s, picture.get("schedule"))

    def _body(self, request: Request, sent_s: float) -> bytes:
        fields: dict[str, object] = {
            "model": self._wire.model,
            "prompt": request.prompt,
            "n": 1,
            "size": f"{request.shape.width}x{request.shape.height}",
            "seed": request.seed,
            "num_inference_steps": request.num_steps or None,
        }
        if self._wire.sends_slo:
            fields["slo_ms"] = round(max(_LEAST_SLO_MS, (request.deadline_s - sent_s) * 1000), 3)
        if request.priority:
            fields["priority"] = request.priority
        fields |= self._wire.extra
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode("ascii")


def _picture(answer: Answer) -> dict[str, Any]:
    """The one item of an answer's `data`.

    Raises:
        ValueError: not an answer with a picture.
    """
    try:
        picture = json.loads(answer.body)["data"][0]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON: {error}") from None
    except (KeyError, IndexError, TypeError):
        raise ValueError("the answer has no data") from None
    if not isinstance(picture, dict) or not (picture.get("b64_json") or picture.get("url")):
        raise ValueError("the answer has neither b64_json nor url")
    return picture


def _save(picture: Mapping[str, Any], path: Path) -> None:
    """
    Raises:
        ValueError: the picture cannot be decoded or written.
    """
    try:
        content = base64.b64decode(picture["b64_json"], validate=True)
        suffix = "jpeg" if content.startswith(b"\xff\xd8") else "webp" if content[8:12] == b"WEBP" else "png"
        path.with_name(f"{path.name}.{suffix}").write_bytes(content)
    except (KeyError, TypeError, binascii.Error):
        raise ValueError("the answer has no b64_json to save") from None
    except OSError as error:
        raise ValueError(f"the picture cannot be written: {error}") from None


def _finished(request: Request, sent_s: float, finish_s: float, schedule: object) -> Attempt:
    runs, predicted_finish_s = _told(request, sent_s, schedule)
    if runs and not request.num_steps:
        request = replace(request, stages=image_stages(sum(run.task.num_steps for run in runs)))
    outcome = Outcome(
        request=request, status=Status.FINISHED, runs=runs, predicted_finish_s=predicted_finish_s, finish_s=finish_s
    )
    return Attempt(outcome=outcome, sent_s=sent_s)


def _told(request: Request, sent_s: float, schedule: object) -> tuple[tuple[Run, ...], float]:
    """TetriServe's `schedule`: what ran, and the finish predicted at admission; no runs from a server that has none."""
    if not isinstance(schedule, dict):
        return (), math.nan
    try:
        runs = tuple(
            Run(
                Task(
                    (request.request_id, *map(str, range(1, int(run.get("batch", 1))))),  # others' ids are not told
                    str(run["stage"]),
                    tuple(run["ranks"]),
                    int(run["num_steps"]),
                ),
                sent_s + float(run["start_s"]),
                sent_s + float(run["end_s"]),
            )
            for run in schedule["runs"]
        )
        return runs, sent_s + float(schedule["predicted_finish_s"])
    except (KeyError, TypeError, ValueError):
        return (), math.nan


def _failed(request: Request, sent_s: float, finish_s: float, kind: str, message: str) -> Attempt:
    outcome = Outcome(
        request=request,
        status=Status.FAILED,
        runs=(),
        predicted_finish_s=math.nan,
        finish_s=finish_s,
        message=message,
    )
    return Attempt(outcome=outcome, sent_s=sent_s, error=kind)
