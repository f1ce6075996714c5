"""The connection below HTTP: clients that dawdle over a request's head, that never take their answer, that never end.

uvicorn waits for them for ever. Bodies that stall are ``service.slow``'s, for an answer is still possible there.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hypersam.settings import Settings
from service.errors import RequestTooSlow, problem

MAX_HEAD_BYTES = 64 << 10
"""Of a request line and its headers, or of anything else that carries no body, such as a chunk's extension."""


def protocol_for(settings: Settings) -> type[asyncio.Protocol]:
    """The class that uvicorn's ``http`` takes, with these settings' times."""
    chosen = {
        "head_seconds": settings.header_timeout,
        "stall_seconds": settings.send_timeout,
        "least_rate": settings.min_rate,
    }
    return type("Connection", (_Connection,), chosen)


class _Connection(HttpToolsProtocol):
    """One client's connection. Times run while the client is who is waited for."""

    head_seconds: float
    """From the connection, or a request's first byte, to the end of its headers."""
    stall_seconds: float
    """For taking some of an answer that waits; for ending what was refused."""
    least_rate: int
    """Bytes a second of an answer that waits."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head = True
        self._gone = False
        self._idle_bytes = 0  # received since the last that meant anything
        self._head_bytes = 0  # of this request's line and headers, as far as the parser has told of them
        self._head: TimerHandle | None = None
        self._stall: TimerHandle | None = None
        self._refused: TimerHandle | None = None

    # the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin with the time for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget all times."""
        self._gone = True
        for timer in (self._head, self._stall, self._refused):
            if timer is not None:
                timer.cancel()
        self._head = self._stall = self._refused = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, but not endlessly many that are neither a whole head nor a body."""
        taken = 0
        while taken < len(data) and not self.transport.is_closing():
            if self._in_head and self._at_rest():
                self._expect_head()  # also where only line ends come, of which the parser says nothing
            # The system may give four times as much at once as a head may have. What is over is not parsed.
            room = max(0, MAX_HEAD_BYTES - self._idle_bytes) if self._in_head else len(data)
            piece = data[taken : taken + room]
            taken += len(piece)
            self._idle_bytes += len(piece)
            if piece:
                self._parse(piece)
            if self.transport.is_closing():
                self._expect_taken()
            elif not piece or self._idle_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    # the parser

    def _parse(self, piece: bytes) -> None:
        """Do what uvicorn does with bytes, except where a head asks for an upgrade.

        The parser stops behind such a head, and takes its body for the next request. We change to no other protocol
        and may pass over the wish (RFC 9110, 7.8). So the head is parsed once more without it, and then what follows.
        """
        self._unset_keepalive_if_required()
        rest = memoryview(piece)  # there may be thousands of such heads in it
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except HttpParserUpgrade as stopped:
                    rest = rest[stopped.args[0] :]
                if self.parser.get_method() == b"CONNECT":  # stops the parser in any case
                    self.send_400_response("CONNECT is not served")
                    return
                head = self._head_without_upgrade()
                # A new one, for the old may still know the length of the body. It is lenient as uvicorn's own.
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
        except HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)

    def _head_without_upgrade(self) -> bytes:
        """The head that was parsed. That ``Connection`` still names the header does no harm where that is missing."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        """Some of what is asked for."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after a body in chunks."""
        self._count_head(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is here."""
        if self.parser.should_upgrade():
            return  # it comes once more, see _parse
        self._in_head, self._idle_bytes = False, 0
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        if self.parser.should_upgrade():
            return  # only of its head
        self._in_head, self._idle_bytes = True, 0
        if self._refused is not None:
            self._refused.cancel()
            self._refused = None
        super().on_message_complete()

    # answers

    def on_response_complete(self) -> None:
        """The answer is out. If the request is not, it was refused, and what still comes is read for a while only."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_taken()
        elif not self._in_head and self._at_rest() and self._refused is None:  # the body is not that of a next request
            self._refused = self.loop.call_later(self.stall_seconds, self.transport.close)

    def pause_writing(self) -> None:
        """The client takes its answer slower than it is made."""
        super().pause_writing()
        self._expect_taken()

    def resume_writing(self) -> None:
        """It has taken what was waiting."""
        super().resume_writing()
        if self._stall is not None and not self.transport.is_closing():
            self._stall.cancel()
            self._stall = None

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more was asked for."""
        super().timeout_keep_alive_handler()
        self._expect_taken()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or has a head that is too large, at which the parser was stopped."""
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            self._refuse(400, "bad_http", msg)

    # heads that are too large

    def _count_head(self, size: int) -> None:
        # Where several requests come at once, only the parser knows where each begins.
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the request's head is too large")  # stops the parser; answered by send_400_response

    def _refuse_head(self) -> None:
        self._refuse(431, "head_too_large", f"the request's head has more than {MAX_HEAD_BYTES} bytes")

    # times

    def _at_rest(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self._head_late)

    def _expect_taken(self) -> None:
        if self._stall is None and not self._gone:
            self._stall = self.loop.call_later(self.stall_seconds, self._taken_late, self._untaken())

    def _taken_late(self, before: int) -> None:
        self._stall = None
        # Some seconds may go by before the system has room for more although the client takes what there is.
        if before - self._untaken() > self.least_rate * self.stall_seconds:
            self._expect_taken()
        else:
            self.transport.abort()

    def _untaken(self) -> int:
        """Bytes of answers that wait here or in the system for the client to take them."""
        link = self.transport.get_extra_info("socket")
        if link is None or link.fileno() < 0:
            return 0
        queued = fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def _head_late(self) -> None:
        self._head = None
        if self.flow.read_paused:  # an earlier request is not answered yet: we do not read, the client is not late
            self._expect_head()
        elif self._idle_bytes:
            message = f"the request's head did not come within {self.head_seconds:g} s"
            self._refuse(408, RequestTooSlow.code, message)
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """End the connection; with an answer, unless that would get into another one."""
        if self._at_rest() or not (self.cycle.response_started or self.pipeline):
            body = bytes(problem(status, code, detail).body)
            self.transport.write(
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/problem+json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                + body
            )
        self.transport.close()
        self._expect_taken()
