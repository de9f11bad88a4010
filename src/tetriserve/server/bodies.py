"""Bodies that may bring pictures: as forms of multipart/form-data, and as JSON with data URLs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from tetriserve.core.errors import InvalidRequest
from tetriserve.server.forms import Part, read_form
from tetriserve.server.pictures import files_of

MAX_FIELD_BYTES = 2**16
"""Of a text in a form: 8000 characters of a prompt, and room to spare."""

_NUMBER = re.compile(r"-?(0|[1-9]\d{0,399})(\.\d{1,400})?([eE][+-]?\d{1,4})?", re.ASCII)
_WORDS = {"true": True, "false": False}
_LORA_FIELD = re.compile(r"lora\[(\w+)\]", re.ASCII)
"""How clients write `{"lora": {"scale": 1}}`."""
_URL_START = b"data:"

Body = TypeVar("Body", bound=BaseModel)


class Asked(NamedTuple, Generic[Body]):
    """What a body says. `files` are pictures, of which nothing is checked; `param` is what the client calls them."""

    body: Body
    files: list[bytes]
    param: str


class BodyReader(Generic[Body]):
    """Reads what is to be of one schema.

    picture: the field of a form that pictures are in.
    pictures_of: the files in a body of JSON, and the field that they are in. It runs in a thread.
    json_only: fields that only JSON has: in a form `picture` takes their place.
    """

    def __init__(
        self,
        schema: type[Body],
        picture: str,
        pictures_of: Callable[[Body], tuple[list[bytes], str]],
        json_only: frozenset[str] = frozenset(),
    ) -> None:
        self._schema = schema
        self._picture = picture
        self._pictures_of = pictures_of
        self._json_only = json_only
        self._texts = frozenset(name for name, field in schema.model_fields.items() if _takes_text(field.annotation))

    async def read(self, request: Request) -> Asked[Body]:
        """
        Raises:
            InvalidRequest, RequestValidationError: it is not of the schema.
            ClientDisconnect: the client is gone.
        """
        request.state.schema = self._schema
        body = b"".join([chunk async for chunk in request.stream()])
        content_type = request.headers.get("content-type", "")
        match content_type.partition(";")[0].strip().lower():
            case "multipart/form-data":
                return await asyncio.to_thread(lambda: self._of_form(read_form(body, content_type)))
            case "application/json":
                return await asyncio.to_thread(lambda: self.of_json(parsed_json(body)))
        raise InvalidRequest(
            "send the body as a form or as JSON, with the header Content-Type: multipart/form-data or application/json"
        )

    def of_json(self, said: object) -> Asked[Body]:
        """Takes as long as its pictures have bytes: call it off the event loop.

        Raises: as `read`.
        """
        body = self._validated(said)
        return Asked(body, *self._pictures_of(body))

    def _of_form(self, parts: Sequence[Part]) -> Asked[Body]:
        files = [self._file_of(part) for part in parts if _name_of(part) == self._picture]
        fields: dict[str, Any] = {}
        for part in parts:
            name = _name_of(part)
            if name == self._picture:
                continue
            value = self._value_of(name, part)
            if match := _LORA_FIELD.fullmatch(part.name):
                lora = fields.setdefault(name, {})
                if not isinstance(lora, dict) or match[1] in lora:
                    raise InvalidRequest(f"{name} is given twice", name)
                lora[match[1]] = value
            elif name not in fields:
                fields[name] = [value] if part.name.endswith("[]") else value
            elif name == "degrees":
                fields[name] = [*_listed(fields[name]), value]
            else:
                raise InvalidRequest(f"{name} is given twice", name)
        return Asked(self._validated(fields), files, self._picture)

    def _file_of(self, part: Part) -> bytes:
        if part.is_file or not part.content.startswith(_URL_START):
            return bytes(part.content)
        (file,) = files_of([part.content.decode("latin-1")], self._picture)
        return file

    def _value_of(self, name: str, part: Part) -> object:
        """The text, or the number or the boolean that a field which takes no text says in the way of JSON.

        Raises:
            InvalidRequest: it is no text.
        """
        if name not in self._schema.model_fields:
            return None  # which is refused by its name
        if name in self._json_only:
            raise InvalidRequest(
                f"{name} is a field of JSON; in a form pictures are files called {self._picture}", name
            )
        if part.is_file:
            raise InvalidRequest(f"{name} is a file; allowed: text", name)
        if len(part.content) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{name} has {len(part.content)} bytes; allowed: at most {MAX_FIELD_BYTES}", name)
        try:
            text = part.content.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"{name} is not UTF-8", name) from None
        if name in self._texts and part.name != "lora[scale]":
            return text
        return json.loads(text) if _NUMBER.fullmatch(text) else _WORDS.get(text, text)

    def _validated(self, said: object) -> Body:
        try:
            return self._schema.model_validate(said)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None


def parsed_json(body: bytes) -> object:
    """
    Raises:
        InvalidRequest, RequestValidationError: it is none.
    """
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        what = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}, "input": {}}
        raise RequestValidationError([what]) from None
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not valid JSON") from None


def _name_of(part: Part) -> str:
    """Without brackets, by which clients write lists and objects."""
    return part.name.partition("[")[0]


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _takes_text(annotation: object) -> bool:
    return annotation is str or isinstance(annotation, str) or any(map(_takes_text, get_args(annotation)))
