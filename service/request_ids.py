"""An id for every request: the client's own or a new one, in the answer's header and in every log line."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypersam.logs import request_id

log = logging.getLogger("hypersam.requests")

HEADER = "X-Request-ID"
_USABLE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_SHOWN = 256
"""Characters of a path that are logged."""
_QUIET = frozenset({"/healthz", "/readyz", "/metrics", "/health"})  # asked every few seconds by machines


class RequestIds:
    """ASGI middleware that names each request and logs a line when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        own = given if _USABLE.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(own)
        began, status = time.perf_counter(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = own
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            if log.isEnabledFor(level):
                milliseconds = round(1000 * (time.perf_counter() - began), 1)
                client = scope.get("client")
                path = ascii(scope["path"])[1:-1][:_SHOWN]  # decoded: it may hold line ends and a terminal's commands
                log.log(
                    level, "%s %s %d %.1f ms", scope["method"], path, status, milliseconds,
                    extra={
                        "method": scope["method"], "path": path, "status": status, "ms": milliseconds,
                        "client": client[0] if client else None,
                    },
                )  # fmt: skip
            request_id.reset(token)
