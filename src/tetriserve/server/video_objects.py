"""From videos as jobs to what their clients are told of them."""

from __future__ import annotations

import math

from tetriserve.core.errors import VideoFailed, VideoNotReady
from tetriserve.core.forecast import Forecast
from tetriserve.engine import Jobs, Video, VideoStatus
from tetriserve.server.errors import response_to
from tetriserve.server.images import schedule
from tetriserve.server.video_schemas import VideoError, VideoObject

POLL_HEADER = "openai-poll-after-ms"
MIN_POLL_MS, MAX_POLL_MS = 100, 10_000
_POLLS = 10.0
"""Polls on the way. OpenAI's client keeps the first interval that it is told: an answer is late by a tenth at most."""


async def forecast_for(videos: list[Video], jobs: Jobs) -> Forecast | None:
    """What is expected of those that are not finished; None if all are."""
    return await jobs.engine.forecast() if any(video.ended_at is None for video in videos) else None


def object_of(video: Video, jobs: Jobs, forecast: Forecast | None) -> VideoObject:
    """`forecast` knows it, unless it is finished or came later."""
    request = video.request
    assert request is not None and request.video is not None, "it was admitted"
    shape, fps, ended_at = request.shape, request.video.fps, video.ended_at
    said: dict[str, object] = {}
    if video.made is not None and video.status is VideoStatus.COMPLETED:
        said["schedule"] = schedule(video.made.outcome)
    if video.facts.warnings:
        said["warnings"] = list(video.facts.warnings)
    return VideoObject.model_validate(
        {
            "id": video.facts.id,
            "object": "video",
            "model": video.facts.model,
            "status": video.status.value,
            "progress": video.percent(_steps_running(request.request_id, jobs)),
            "created_at": int(video.created_at),
            "completed_at": int(ended_at) if ended_at and video.status is VideoStatus.COMPLETED else None,
            "expires_at": None if ended_at is None else int(ended_at + jobs.result_ttl_s),
            "prompt": request.prompt,
            "size": f"{shape.width}x{shape.height}",
            "seconds": f"{shape.frames / fps:.4g}",
            "num_frames": shape.frames,
            "fps": fps,
            "seed": request.seed,
            "remixed_from_video_id": video.facts.remixed_from,
            "error": _error_of(video),
            "slo_ms": round((request.deadline_s - request.arrival_s) * 1000, 3),
            "predicted_finish_ms": remaining_ms(video, jobs, forecast),
            **said,
        }
    )


def remaining_ms(video: Video, jobs: Jobs, forecast: Forecast | None) -> float | None:
    """Until its forecast finish; None if it is finished, or not known to the forecast."""
    if forecast is None or video.request is None or video.ended_at is not None:
        return None
    finish_s = forecast.finish_s.get(video.request.request_id, math.inf)
    return None if math.isinf(finish_s) else max(0.0, round((finish_s - jobs.engine.now) * 1000, 3))


def poll_after_ms(video: Video, jobs: Jobs, forecast: Forecast | None) -> int:
    """When it is worth asking for a video again that is not finished."""
    remaining, engine = remaining_ms(video, jobs, forecast), jobs.engine
    if remaining is None:  # it came after the forecast was made, or waits for a turn, or no rank is up
        assert video.request is not None, "it was admitted"
        remaining = (engine.controller.earliest_finish(video.request, engine.now) - engine.now) * 1000
    return int(min(max(remaining / _POLLS, MIN_POLL_MS), MAX_POLL_MS))


def check_completed(video: Video, what: str) -> None:
    """`what` needs it to be.

    Raises:
        VideoNotReady, VideoFailed: it is not.
    """
    error = _error_of(video)
    if error is not None:
        raise VideoFailed(f"video {video.facts.id} has failed ({error.code}): {error.message}")
    if video.status is not VideoStatus.COMPLETED:
        raise VideoNotReady(f"video {video.facts.id} is {video.status}; {what} needs it to be completed")


def _steps_running(request_id: str, jobs: Jobs) -> int:
    """Steps that a task which runs for the request has made, by the time that they are expected to take. Some policies
    have all steps in one task, whose end would be the first that is heard of them.
    """
    engine = jobs.engine
    for flight in engine.state.in_flight:
        if request_id in flight.task.members and flight.task.num_steps:
            share = (engine.now - flight.start_s) / max(flight.end_s - flight.start_s, 1e-9)
            return min(int(share * flight.task.num_steps), flight.task.num_steps - 1)
    return 0


def _error_of(video: Video) -> VideoError | None:
    if video.failure is None:
        return None
    response = response_to(video.failure)
    return VideoError(code=response.code, message=response.message)
