"""multipart/form-data in memory: starlette's own reader would write large files to the disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tetriserve.core.errors import InvalidRequest

MAX_PARTS = 100


@dataclass
class Part:
    """`is_file`: it was sent with the name of a file, which is not kept."""

    name: str
    is_file: bool
    content: bytearray = field(default_factory=bytearray, repr=False)


def read_form(body: bytes, content_type: str) -> list[Part]:
    """The parts of a form in order, `MAX_PARTS` of them at most.

    Raises:
        InvalidRequest: `body` is no form, or not a whole one.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("the header Content-Type: multipart/form-data names no boundary")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks)  # type: ignore[arg-type]
        parser.write(body)
    except FormParserError:
        raise InvalidRequest("the body is no form of multipart/form-data that can be read") from None
    if not reader.is_whole:
        raise InvalidRequest("the form ends before its last boundary")
    return reader.parts


class _Reader:
    """Hears of a form's pieces."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.is_whole = False
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self.callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_begin": self._begin_header,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._name_part,
            "on_part_data": lambda data, start, end: self.parts[-1].content.extend(data[start:end]),
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts")
        self._disposition = b""

    def _begin_header(self) -> None:
        self._header = bytearray(), bytearray()

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)

    def _name_part(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise InvalidRequest("a part of the form has no name")
        try:
            name = options[b"name"].decode()
        except UnicodeDecodeError:
            raise InvalidRequest("the name of a part of the form is not UTF-8") from None
        self.parts.append(Part(name, b"filename" in options))

    def _end(self) -> None:
        self.is_whole = True
