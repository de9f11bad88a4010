"""What goes over the wire of `/v1/images/edits`: as JSON, and as the form that OpenAI's clients send."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from tetriserve.server.schemas import ImagesRequest, inlined

MAX_IMAGES = 16
"""As OpenAI says; models take fewer."""
_LINK_KEYS = {"type", "image_url", "url", "detail"}


def url_of(item: object) -> str | None:
    """The URL in one of the forms in which clients write it; None if it is none of them."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and item.keys() <= _LINK_KEYS:
        match item:
            case {"image_url": {"url": str(url)}} | {"image_url": str(url)} | {"url": str(url)}:
                return url
    return None


def _urls_of(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if len(items) > MAX_IMAGES:
        raise PydanticCustomError("picture", "has more than {most} items", {"most": MAX_IMAGES})
    urls = [url for item in items if (url := url_of(item)) is not None]
    if len(urls) < len(items):
        raise PydanticCustomError(
            "picture", "must be a data URL, or an object with one as url or image_url, or a list of these"
        )
    return tuple(urls)


_LINK: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"image_url": {"type": "string"}, "url": {"type": "string"}},
            "additionalProperties": False,
        },
    ]
}
_LINKS = {"type": "array", "items": _LINK, "maxItems": MAX_IMAGES}

Pictures = Annotated[
    tuple[str, ...], BeforeValidator(_urls_of), WithJsonSchema({"anyOf": [*_LINK["anyOf"], _LINKS, {"type": "null"}]})
]
"""Data URLs."""


class EditsRequest(ImagesRequest):
    """Body of `POST /v1/images/edits` as JSON, and of `POST /v1/quotes`: what is asked of images, and pictures."""

    image: Pictures = Field(
        (), description="Pictures as data URLs (`data:image/png;base64,...`), of png, jpeg or webp.", repr=False
    )
    images: Pictures = Field((), description="The same as `image`, in OpenAI's JSON form.", repr=False)
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="One fidelity is served; high is ignored. Where the image starts from a picture, `strength`."
    )


UNSERVED = {
    "mask": "the whole image is drawn anew; no model here takes a mask",
    "markup": "no model here takes a drawing laid over the image",
}
"""Documented parameters of OpenAI's `images.edit` that would change what is drawn: why they are refused."""


def edits_body() -> dict[str, Any]:
    """`requestBody` for `/openapi.json`."""
    described = inlined(EditsRequest)
    file = {"type": "string", "format": "binary"}
    fields = {name: schema for name, schema in described["properties"].items() if name not in ("image", "images")}
    picture = {"description": "A png, jpeg or webp file; several under the same name or `image[]`."}
    image = picture | {"anyOf": [file, {"type": "array", "items": file, "maxItems": MAX_IMAGES}]}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": image, **fields},
                    "required": ["image", "prompt"],
                    "additionalProperties": False,
                }
            },
            "application/json": {"schema": described},
        },
    }
