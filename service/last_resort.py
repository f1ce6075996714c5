"""What no handler took still leaves as a problem document, and is counted, named and logged as every answer is."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypersam.errors import Unavailable
from service.errors import answer, unexpected

log = logging.getLogger("hypersam.requests")


class LastResort:
    """ASGI middleware around the guard and the routes, inside what measures and names requests.

    Starlette's own last resort lies outside all of that: its answers have no id, and neither does its log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            # Only the server cancels a request: it stops, and has waited as long as it may.
            task = asyncio.current_task()
            if started or task is None:
                raise
            task.uncancel()
            await answer(Unavailable("the service was stopped before this was done; try again"))(scope, receive, send)
        except Exception as error:
            named = scope["method"], ascii(scope["path"])[1:-1]
            if started:
                log.error("%s %s broke off: %s: %s", *named, type(error).__name__, error)
                raise  # the server ends the connection, and logs where it was
            log.exception("%s %s failed", *named)
            await unexpected()(scope, receive, send)
