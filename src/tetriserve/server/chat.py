"""`/v1/chat/completions` with an image for an answer, as the load generators of vLLM-Omni and GF-DiT ask for it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack

from fastapi import APIRouter, Request, Response

from tetriserve.core.errors import InvalidRequest
from tetriserve.server.chat_schemas import (
    ChatAnswer,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    ChatUsage,
    ImagePart,
    Link,
    Message,
)
from tetriserve.server.compat import Table, Unserved, warnings_of
from tetriserve.server.disconnect import ClientGone
from tetriserve.server.edit_schemas import url_of
from tetriserve.server.errors import KEY_RESPONSES, RESPONSES
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST
from tetriserve.server.idempotency import KeyHeader
from tetriserve.server.pictures import files_of
from tetriserve.server.schemas import ImagesRequest, ImagesResponse, PictureOptions, Schedule
from tetriserve.server.uploads import CHAT as CHAT_PATH
from tetriserve.server.work import IdHeader, Service, SloHeader

_OF_TEXTS = Unserved("it is of texts, and the answer is an image")
_TEXT_PARAMETERS = (
    "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "max_tokens", "max_completion_tokens",
    "stop", "logit_bias", "top_logprobs", "reasoning_effort", "verbosity", "parallel_tool_calls",
)  # fmt: skip
CHAT: Table = dict.fromkeys(_TEXT_PARAMETERS, _OF_TEXTS) | {
    "service_tier": Unserved("the deadline is slo_ms, the class priority"),
    "store": Unserved("chats are not kept", (False,)),
    "metadata": Unserved("chats are not kept"),
    "prompt_cache_key": Unserved("there is no cache of prompts"),
    "stream_options": Unserved("the answer is not streamed"),
}
"""What chats may ask for in vain, beside what images may."""


def chat_router(service: Service) -> APIRouter:
    router = APIRouter(responses=RESPONSES)

    @router.post(CHAT_PATH, response_model=ChatResponse, responses=KEY_RESPONSES)
    async def complete_chat(
        request: Request,
        body: ChatRequest,
        x_slo_ms: SloHeader = None,
        x_request_id: IdHeader = None,
        idempotency_key: KeyHeader = None,
    ) -> Response:
        """Make `n` images of one message: as `/v1/images/generations`, or with pictures in it `/v1/images/edits`. The
        answer is a chat's, and not streamed.
        """
        service.slot.require()
        warnings = warnings_of(body, CHAT, service.api.compat)
        asked, urls = images_request(body)
        files = await asyncio.to_thread(files_of, urls, "messages")
        work = await service.work_with(request, asked, x_slo_ms, files, "messages", warnings)
        with ExitStack() as pending:
            try:
                images = await work.images(idempotency_key, pending)
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            answer = chat_response(await work.response(images))
            text = await asyncio.to_thread(answer.model_dump_json, exclude_none=True)
        return Response(text, media_type="application/json")

    return router


def images_request(body: ChatRequest) -> tuple[ImagesRequest, list[str]]:
    """The same as a request for images, and the URLs of the pictures that come with it.

    Raises:
        InvalidRequest: the chat asks for something else than images of one text.
    """
    if body.modalities is not None and "image" not in body.modalities:
        raise InvalidRequest(f"modalities is {body.modalities[:8]!r:.100}; served: 'image'", "modalities")
    beside, nested = _given(body), {} if body.extra_body is None else _given(body.extra_body)
    for name in beside.keys() & nested.keys():
        if beside[name] != nested[name]:
            raise InvalidRequest(f"{name} differs from {name} in extra_body; leave one out", name)
    asked = beside | nested
    if asked.get("stream"):
        raise InvalidRequest(
            "stream is true; chats are answered whole here, and streams are served by /v1/images/generations", "stream"
        )
    prompt, urls = content_of(body.messages)
    return ImagesRequest.model_validate({"prompt": prompt, **asked}), urls


def content_of(messages: Sequence[Message]) -> tuple[str, list[str]]:
    """The text of the one message, and the URLs of its pictures.

    Raises:
        InvalidRequest: there are others, or no text, or what is neither text nor picture.
    """
    if len(messages) != 1:
        reason = f"messages has {len(messages)} items; allowed: 1, as a picture continues no conversation"
        raise InvalidRequest(reason, "messages")
    (message,) = messages
    if message.role != "user":
        raise InvalidRequest(f"messages: the role is {message.role[:80]!r}; allowed: 'user'", "messages")
    if isinstance(message.content, str):
        return message.content, []
    texts, urls = [], []
    for part in message.content or ():
        if part.type == "text" and part.text is not None:
            texts.append(part.text)
        elif part.type == "image_url" and (url := url_of(part.image_url)) is not None:
            urls.append(url)
        else:
            allowed = "allowed: 'text' with a text, and 'image_url' with a data URL"
            raise InvalidRequest(f"messages: a part is of type {part.type[:80]!r}; {allowed}", "messages")
    if not texts:
        raise InvalidRequest("messages: the message has no text; the prompt is its text", "messages")
    return "\n".join(texts), urls


def chat_response(images: ImagesResponse) -> ChatResponse:
    """The same images as the answer of a chat."""
    choices = []
    for index, image in enumerate(images.data):
        url = image.url or f"data:image/{images.output_format};base64,{image.b64_json}"
        part = ImagePart(
            image_url=Link(url=url),
            stage_durations=_durations(image.schedule),
            seed=image.seed,
            schedule=image.schedule,
        )
        choices.append(ChatChoice(index=index, message=ChatAnswer(content=[part])))
    usage = images.usage
    return ChatResponse(
        id=images.id,
        created=images.created,
        model=images.model,
        choices=choices,
        usage=ChatUsage(
            prompt_tokens=usage.input_tokens,
            completion_tokens=usage.output_tokens,
            total_tokens=usage.total_tokens,
        ),
        warnings=images.warnings,
    )


def _given(options: PictureOptions) -> dict[str, object]:
    """What is said of pictures, by name."""
    return {name: value for name in PictureOptions.model_fields if (value := getattr(options, name)) is not None}


def _durations(schedule: Schedule) -> dict[str, float]:
    """Seconds by stage, in their order, after those in which no task ran."""
    seconds: defaultdict[str, float] = defaultdict(float, queued=schedule.queued_s)
    for run in schedule.runs:
        seconds[run.stage] += run.end_s - run.start_s
    return {stage: round(duration_s, 6) for stage, duration_s in seconds.items()}
