"""`/v1/videos`: OpenAI's videos API. A video is a job; its file is on disk until it expires."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from tetriserve.core.errors import InvalidRequest
from tetriserve.engine import GeneratedVideo, Jobs, Video
from tetriserve.models.video_file import VideoFile
from tetriserve.server.access import Caller
from tetriserve.server.disconnect import ClientGone, unless_gone
from tetriserve.server.errors import KEY_RESPONSES, RESPONSES
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST, Exchange
from tetriserve.server.file_answers import FILE_RESPONSES, FileAnswer
from tetriserve.server.idempotency import KeyHeader, begin_video
from tetriserve.server.schemas import ErrorEnvelope
from tetriserve.server.uploads import VIDEOS, VIDEOS_SYNC
from tetriserve.server.video_objects import POLL_HEADER, check_completed, forecast_for, object_of, poll_after_ms
from tetriserve.server.video_schemas import RemixRequest, VideoDeleted, VideoList, VideoObject, videos_body
from tetriserve.server.video_work import VideoWork, remix_of, videos_reader, work_of
from tetriserve.server.work import IdHeader, Service, SloHeader

Variant = Literal["video", "thumbnail"]
MEDIA_TYPES: dict[Variant, str] = {"video": "video/mp4", "thumbnail": "image/jpeg"}
_SUFFIXES: dict[Variant, str] = {"video": "mp4", "thumbnail": "jpg"}
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorEnvelope, "description": "The video is not finished (video_not_ready), or failed."}
}
_POLLED: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            POLL_HEADER: {
                "description": "Milliseconds after which to ask again, of a video that is not finished.",
                "schema": {"type": "integer"},
            }
        }
    }
}


def videos_router(service: Service) -> APIRouter:
    router = APIRouter(responses=RESPONSES)
    reader = videos_reader()

    async def read(request: Request, slo_ms: float | None) -> VideoWork:
        service.slot.require()
        asked = await reader.read(request)
        work = await work_of(service, request, asked, slo_ms)
        del asked
        request.state.exchange.upload.release()
        return work

    @router.post(
        VIDEOS, response_model=VideoObject, responses=_POLLED | KEY_RESPONSES,
        openapi_extra={"requestBody": videos_body()},
    )  # fmt: skip
    async def create_video(
        request: Request,
        x_slo_ms: SloHeader = None,
        x_request_id: IdHeader = None,
        idempotency_key: KeyHeader = None,
    ) -> Response:
        """Accept a video, which is then made whether or not its client stays: ask `/v1/videos/{id}` for it."""
        try:
            work = await read(request, x_slo_ms)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return await answer(await accept(request, work, idempotency_key))

    @router.post(
        VIDEOS_SYNC, response_class=Response, responses=_file_of("video") | KEY_RESPONSES,
        openapi_extra={"requestBody": videos_body()},
    )  # fmt: skip
    async def make_video(
        request: Request,
        x_slo_ms: SloHeader = None,
        x_request_id: IdHeader = None,
        idempotency_key: KeyHeader = None,
    ) -> Response:
        """Make a video, and answer with its MP4 file. Closing the connection cancels it, unless it has an idempotency
        key; then it is a job as those of `/v1/videos`.
        """
        try:
            work = await read(request, x_slo_ms)
            if idempotency_key is None:
                return await make(request, work)
            video = await accept(request, work, idempotency_key)
            if video.job is not None:
                await unless_gone(request, video.job.outputs())
        except (ClientDisconnect, ClientGone):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return await content(video, "video")

    @router.get(VIDEOS, response_model_exclude_unset=True)
    async def list_videos(
        request: Request,
        after: Annotated[str | None, Query(description="Id of the last video that is known already.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[Literal["asc", "desc"], Query(description="By their creation.")] = "desc",
    ) -> VideoList:
        """The API key's videos: unfinished, failed, and completed until they expire."""
        jobs = service.slot.require_jobs()
        videos = jobs.videos(tenant_of(request))
        if order == "desc":
            videos.reverse()
        if after is not None:
            known = [video.facts.id for video in videos]
            if after not in known:
                raise InvalidRequest(f"after is {after[:80]!r}; allowed: the id of one of your videos", "after")
            videos = videos[known.index(after) + 1 :]
        shown = videos[:limit]
        forecast = await forecast_for(shown, jobs)
        return VideoList(
            object="list",
            data=[object_of(video, jobs, forecast) for video in shown],
            first_id=shown[0].facts.id if shown else None,
            last_id=shown[-1].facts.id if shown else None,
            has_more=len(videos) > len(shown),
        )

    @router.get(f"{VIDEOS}/{{video_id}}", response_model=VideoObject, responses=_POLLED)
    async def get_video(request: Request, video_id: str) -> Response:
        """How a video is."""
        return await answer(find(request, video_id))

    @router.delete(f"{VIDEOS}/{{video_id}}")
    async def delete_video(request: Request, video_id: str) -> VideoDeleted:
        """Forget a video and its files. One that is not finished is cancelled: its ranks are free when the task ends
        that runs for it.
        """
        await service.slot.require_jobs().delete_video(find(request, video_id))
        return VideoDeleted(id=video_id)

    @router.get(
        f"{VIDEOS}/{{video_id}}/content", response_class=Response,
        responses=_file_of("video", "thumbnail") | FILE_RESPONSES | _CONFLICT,
    )  # fmt: skip
    async def get_content(request: Request, video_id: str, variant: Variant = "video") -> Response:
        """The MP4 file of a completed video, or a JPEG file of its first frame. The header Range is understood."""
        return await content(find(request, video_id), variant)

    @router.post(f"{VIDEOS}/{{video_id}}/remix", response_model=VideoObject, responses=_POLLED | _CONFLICT)
    async def remix_video(
        request: Request,
        video_id: str,
        body: RemixRequest,
        x_request_id: IdHeader = None,
    ) -> Response:
        """Make a completed video once more with another prompt: the same size, length, seed and settings."""
        source = find(request, video_id)
        check_completed(source, "a remix")
        work = remix_of(service, request, body, source)
        return await answer(await accept(request, work, None))

    def find(request: Request, video_id: str) -> Video:
        return service.slot.require_jobs().video(tenant_of(request), video_id)

    async def accept(request: Request, work: VideoWork, key: str | None) -> Video:
        """The job, once it is admitted.

        Raises: why it is not.
        """
        video = begin_video(service.slot, request.state.client, work.generation, work.facts, key)
        if video.job is not None:
            await video.job.admitted()
        request.state.exchange.facts |= {
            "video": video.facts.id,
            "frames": video.request and video.request.shape.frames,
        }
        return video

    async def answer(video: Video) -> Response:
        jobs: Jobs = service.slot.require_jobs()
        forecast = await forecast_for([video], jobs)
        said = object_of(video, jobs, forecast).model_dump_json(exclude_unset=True)
        headers = {} if video.ended_at is not None else {POLL_HEADER: str(poll_after_ms(video, jobs, forecast))}
        return Response(said, headers=headers, media_type="application/json")

    async def content(video: Video, variant: Variant) -> Response:
        check_completed(video, "its content")
        opened, file = await service.slot.require_jobs().open_video(video, is_thumbnail=variant == "thumbnail")
        name = f"{video.facts.id}.{_SUFFIXES[variant]}"
        return FileAnswer(opened, file, MEDIA_TYPES[variant], {"Content-Disposition": f'inline; filename="{name}"'})

    return router


async def make(request: Request, work: VideoWork) -> Response:
    """A video for this call alone.

    Raises:
        ClientGone: the client closed the connection.
    """
    client: Caller = request.state.client
    exchange: Exchange = request.state.exchange
    with ExitStack() as pending:
        pending.enter_context(client.allowance.admitted(1, time.monotonic()))
        made: GeneratedVideo = await unless_gone(request, work.engine.generate_video(work.generation))
    exchange.note_outcomes([made.outcome])
    exchange.facts["frames"] = made.outcome.request.shape.frames
    assert isinstance(made.content, VideoFile), "it was just made"
    headers = {"X-Num-Frames": str(made.outcome.request.shape.frames), "X-Seed": str(made.outcome.request.seed)}
    if work.facts.warnings:
        headers["X-Warnings"] = "; ".join(work.facts.warnings).encode("ascii", "backslashreplace").decode()
    return Response(made.content.video, headers=headers, media_type=MEDIA_TYPES["video"])


def tenant_of(request: Request) -> str:
    client: Caller = request.state.client
    return client.tenant


def _file_of(*variants: Variant) -> dict[int | str, dict[str, Any]]:
    content = {MEDIA_TYPES[variant]: _BINARY for variant in variants}
    return {200: {"description": "The file.", "content": content}}
