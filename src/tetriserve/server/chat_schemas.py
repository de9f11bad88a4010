"""What goes over the wire of `/v1/chat/completions`: OpenAI's chat, where the answer is an image."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from tetriserve.server.schemas import PictureOptions, Schedule, Text, Warnings

PictureUrl = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "properties": {"url": {"type": "string"}}}]}),
]


class ContentPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str = Field(description="`text` or `image_url`; parts of other types are refused.")
    text: Text | None = Field(None, repr=False)
    image_url: PictureUrl = Field(
        None,
        description="A picture that comes with the prompt: `data:image/png;base64,...`.",
        repr=False,
    )


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(description="`user`; messages of others are refused.")
    content: Text | list[ContentPart] | None = Field(None, repr=False)


class ChatRequest(PictureOptions):
    """Body of `POST /v1/chat/completions`: one message, whose text is the prompt. Its pictures come with it.

    What may be asked of pictures stands beside it or in `extra_body`. What is of texts alone is ignored.
    """

    messages: list[Message] = Field(description="One message of the user.", repr=False)
    extra_body: PictureOptions | None = Field(
        None, description="More of what may be asked of pictures: vLLM-Omni's clients send it as an object of its own."
    )
    modalities: list[str] | None = Field(None, description="If given, `image` is among them.")
    temperature: float | None = Field(None, description="Ignored, as are the following.")
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = Field(None, repr=False)
    logit_bias: dict[str, Any] | None = Field(None, repr=False)
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = Field(None, repr=False)
    prompt_cache_key: str | None = Field(None, repr=False)
    stream_options: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: Annotated[Literal[False] | None, Field(description="An image has none.")] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, Field(description="Without tools there is no choice.")] = (
        None
    )
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Not served, as are functions.")
    functions: Annotated[list[Any], Field(max_length=0)] | None = None


class Link(BaseModel):
    url: str = Field(description="`data:image/...;base64,...`, or an address with `response_format: url`.")


class ImagePart(BaseModel):
    """An image. Durations are seconds."""

    type: Literal["image_url"] = "image_url"
    image_url: Link
    stage_durations: dict[str, float] = Field(description="What the image waited for and what it took, by stage.")
    seed: int
    schedule: Schedule


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: list[ImagePart]


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    finish_reason: Literal["stop"] = "stop"


class ChatUsage(BaseModel):
    """Tokens that the model works on: of the text, padding included, and of the images."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix time in seconds.")
    model: str
    choices: list[ChatChoice] = Field(description="One for each of the `n` images.")
    usage: ChatUsage
    warnings: Warnings = None


UNSERVED = {
    "audio": "the answer is an image",
    "function_call": "functions are not called",
    "prediction": "the answer is an image",
    "web_search_options": "nothing is looked up",
}
"""Documented parameters of OpenAI's chat that would change the answer: why they are refused."""
