"""Multipart forms read as they come: files flow into sinks, small fields are kept, nothing is spooled.

Starlette's own form parser writes every file to a temporary place and knows no limit for a file; a checkpoint
of gigabytes would be written twice.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Protocol
from urllib.parse import parse_qsl

from anyio import move_on_after
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from hypersam.errors import HypersamError
from service.errors import BadMultipart, BodyTooLarge, RequestError, UnsupportedMedia

MAX_FIELD_BYTES = 1 << 20
DRAIN_BYTES = 16 << 20
DRAIN_SECONDS = 2.0
_NPY = b"\x93NUMPY"  # how such a file begins, and no UTF-8 text


class FileSink(Protocol):
    """Takes the bytes of one file."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes; raise to refuse the file."""

    async def close(self) -> None:
        """The file is complete."""


class Form:
    """A form's text fields, and the names that its files had at the client."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filenames: dict[str, str] = {}


class _Events:
    """Collects what the parser finds in one chunk, since its callbacks cannot await."""

    def __init__(self) -> None:
        self.queue: list[tuple[str, bytes]] = []
        self._name = b""
        self._value = b""
        self.headers: dict[bytes, bytes] = {}

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._part_begin,
            "on_part_data": lambda data, start, end: self.queue.append(("data", data[start:end])),
            "on_part_end": lambda: self.queue.append(("part_end", b"")),
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": lambda: self.queue.append(("end", b"")),
        }

    def _part_begin(self) -> None:
        self.headers = {}
        self._name = self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self.headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _headers_finished(self) -> None:
        self.queue.append(("headers", self.headers.get(b"content-disposition", b"")))


async def read_form(
    request: Request, files: Mapping[str, FileSink], fields: frozenset[str], *, field_bytes: int = MAX_FIELD_BYTES
) -> Form:
    """Read a multipart body: the files named in ``files`` into their sinks, ``fields`` as text, each of at most
    ``field_bytes``. A field that is a .npy file is given in base64, as JSON would hold it.

    Raises ``BadMultipart`` for a broken or truncated body, ``RequestError`` for a field that is not known or
    comes twice, and whatever a sink raises. After an error at most a little more of the body is read.
    """
    reader = _FormReader(request, files, fields, field_bytes)
    stream = request.stream()
    try:
        async for chunk in stream:
            await reader.take(chunk)
        return reader.finish()
    except HypersamError:
        await _drain(stream)
        raise


class _FormReader:
    """The state of a form between two chunks."""

    def __init__(
        self, request: Request, files: Mapping[str, FileSink], fields: frozenset[str], field_bytes: int
    ) -> None:
        self._form = Form()
        self._files = files
        self._fields = fields
        self._field_bytes = field_bytes
        self._sink: FileSink | None = None
        self._text: bytearray | None = None
        self._name = ""
        self._ended = False
        self._events = _Events()
        self._parser = _parser(request, self._events)

    async def take(self, chunk: bytes) -> None:
        """Parse one chunk and pass its pieces on."""
        if not chunk:
            return
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadMultipart(f"the body is not a multipart form: {error}") from error
        for kind, data in self._events.queue:
            if kind == "data":
                await self._data(data)
            elif kind == "headers":
                self._headers(data)
            elif kind == "part_end":
                await self._part_end()
            else:
                self._ended = True
        self._events.queue.clear()

    def finish(self) -> Form:
        """Return the form once its last boundary was seen."""
        if not self._ended:
            raise BadMultipart("the multipart form ends before its last boundary: the body was cut off")
        return self._form

    def _headers(self, disposition: bytes) -> None:
        name, filename = _disposition(disposition)
        _check_name(name, {*self._files, *self._fields}, {*self._form.fields, *self._form.filenames})
        self._name, self._sink = name, self._files.get(name)
        self._text = None if self._sink is not None else bytearray()
        if self._sink is not None:
            self._form.filenames[name] = filename

    async def _data(self, data: bytes) -> None:
        if self._sink is not None:
            await self._sink.write(data)
        elif self._text is not None:
            self._text += data
            if len(self._text) > self._field_bytes:
                raise BodyTooLarge(f"the field {self._name!r} has more than {self._field_bytes} bytes")

    async def _part_end(self) -> None:
        if self._sink is not None:
            await self._sink.close()
        elif self._text is not None:
            self._form.fields[self._name] = _decode(self._name, self._text)
        self._sink = self._text = None


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Read a little of what still comes: a client that reads only after sending all then gets its answer."""
    left = DRAIN_BYTES
    with move_on_after(DRAIN_SECONDS):
        async for chunk in stream:
            left -= len(chunk)
            if left < 0:
                return


def _parser(request: Request, events: _Events) -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadMultipart("Content-Type must be multipart/form-data with a boundary")
    try:
        return MultipartParser(boundary, events.callbacks())  # type: ignore[arg-type]
    except FormParserError as error:
        raise BadMultipart(str(error)) from error


def _disposition(header: bytes) -> tuple[str, str]:
    kind, options = parse_options_header(header)
    if kind != b"form-data" or b"name" not in options:
        raise BadMultipart("a part has no Content-Disposition with a name")
    name = options[b"name"].decode("utf-8", "replace")
    return name, options.get(b"filename", b"").decode("utf-8", "replace")


def _check_name(name: str, known: Collection[str], seen: Collection[str]) -> None:
    if name not in known:
        raise RequestError(f"unknown form field {name[:64]!r}; known are {', '.join(sorted(known))}")
    if name in seen:
        raise RequestError(f"the form field {name!r} comes twice")


def _decode(name: str, text: bytearray) -> str:
    if text.startswith(_NPY):
        return base64.b64encode(text).decode("ascii")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the field {name!r} is not UTF-8") from error


async def read_pairs(request: Request, fields: frozenset[str], limit: int) -> dict[str, str]:
    """Read a form without files, application/x-www-form-urlencoded, of at most ``limit`` bytes.

    Raises BodyTooLarge, RequestError for a field that is not known or comes twice, and UnsupportedMedia for JSON, which
    curl sends by that name unless it is told.
    """
    body = await read_body(request, limit)
    if body.lstrip().startswith(b"{"):
        raise UnsupportedMedia("the body looks like JSON: send it with Content-Type: application/json")
    try:
        pairs = parse_qsl(body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=64)
    except ValueError as error:
        raise RequestError(f"the body is no form: {error}") from error
    found: dict[str, str] = {}
    for name, value in pairs:
        _check_name(name, fields, found)
        found[name] = value
    return found


async def read_body(request: Request, limit: int) -> bytes:
    """Return a whole body of at most ``limit`` bytes, or raise ``BodyTooLarge``."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLarge(f"the body has more than the {limit} bytes accepted here")
    return bytes(body)


def media_type(request: Request) -> str:
    """Return the body's media type, without parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
