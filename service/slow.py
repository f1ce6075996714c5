"""Bodies that stall: an upload may be slow, but not so slow that it is there for ever."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypersam.settings import Settings
from service.errors import RequestTooSlow


class BodyPace:
    """ASGI middleware: reading a body raises ``RequestTooSlow`` where nothing came for ``body_timeout`` seconds, or
    less than ``min_rate`` bytes a second in ``body_window`` seconds.

    Only the time counts in which the service waits for the client, so that a slow disk is not the client's fault.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._silence = settings.body_timeout
        self._window = settings.body_window
        self._rate = settings.min_rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        whole = answering = False
        waited, received = 0.0, 0

        async def paced() -> Message:
            nonlocal whole, waited, received
            if whole:  # what comes now is the news that the client has gone, whenever it goes
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._silence):
                    message = await receive()
            except TimeoutError:
                return late(f"no byte of the body came for {self._silence:g} s")
            waited += time.monotonic() - began
            received += len(message.get("body", b""))
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            if not whole and waited >= self._window:
                if received < self._rate * waited:
                    return late(f"the body came at {received / waited:.0f} bytes a second, less than {self._rate}")
                waited, received = 0.0, 0
            return message

        def late(reason: str) -> Message:
            if answering:  # nobody reads the body any more, one only listens whether the client is there
                return {"type": "http.disconnect"}
            raise RequestTooSlow(f"{reason}; send the request again")

        async def watched(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        await self.app(scope, paced, watched)
