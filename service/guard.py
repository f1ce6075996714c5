"""Who may do what, and how often: before a request's body is read.

Without configured keys everything is open to whoever reaches the port. With keys each route needs a scope; what is
not listed here needs ``admin``, so that a new route is closed until somebody opens it.
"""

from __future__ import annotations

import base64
import binascii
import logging
import math
import time
from collections.abc import Sequence

import redis
from anyio import to_thread
from limits import RateLimitItem, parse
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from hypersam.errors import Unavailable
from hypersam.keys import ApiKey, find_key
from service.errors import problem

log = logging.getLogger(__name__)

_UNREAD = {"Connection": "close"}  # the body, which may be gigabytes, is not read

OPEN = frozenset({"/", "/healthz", "/health", "/readyz", "/docs", "/openapi.json"})
# The first row that fits decides: methods ("*" any), beginning of the path, scopes of which one is enough.
RULES: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("POST", "/segment", ("segment",)),
    ("POST", "/embed", ("segment",)),
    ("POST", "/api/generate", ("segment",)),
    ("*", "/label-studio", ("segment",)),
    ("POST", "/setup", ("segment",)),
    ("POST", "/predict", ("segment",)),
    ("POST", "/compress", ("compress",)),
    ("POST", "/plan", ("compress",)),
    ("*", "/jobs", ("compress",)),
    ("GET HEAD", "/models", ("compress", "segment")),
    ("GET HEAD", "/variants", ("compress", "segment")),
)


def scopes_of(method: str, path: str) -> tuple[str, ...]:
    """The scopes of which a request needs one; none for what is open."""
    if path in OPEN or (path.startswith("/static/") and method in ("GET", "HEAD")):
        return ()
    for methods, start, scopes in RULES:
        if (methods == "*" or method in methods.split()) and (path == start or path.startswith(start + "/")):
            return scopes
    return ("admin",)


class Guard:
    """ASGI middleware: 401 without a key that is known, 403 where it does not open the route, 429 where it is asked
    too often. Rates are counted in Redis for all processes together, by key, or by address where there are no keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], rate_limit: str | None) -> None:
        self.app = app
        self._keys = keys
        self._limit: RateLimitItem | None = parse(rate_limit) if rate_limit else None
        self._limiter: MovingWindowRateLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        needed = scopes_of(scope["method"], scope["path"]) if scope["type"] == "http" else ()
        if not needed:
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        who = request.client.host if request.client else "unknown"
        if self._keys:
            key = find_key(self._keys, _secret(request))
            if key is None:
                detail = "send an API key as 'Authorization: Bearer …', as 'X-API-Key: …' or as the password of Basic"
                challenge = {"WWW-Authenticate": _challenge(request), **_UNREAD}
                await problem(401, "unauthorized", detail, headers=challenge)(scope, receive, send)
                return
            if not any(key.may(each) for each in needed):
                detail = f"the key {key.label!r} has not the scope that this needs: {' or '.join(needed)}"
                await problem(403, "forbidden", detail, headers=_UNREAD)(scope, receive, send)
                return
            who = f"key:{key.label}"
        if self._limit is not None and (refusal := await self._counted(request, self._limit, who)) is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _counted(self, request: Request, limit: RateLimitItem, who: str) -> ASGIApp | None:
        """Count the request; what to answer instead of it if it is one too many."""
        try:
            if self._limiter is None:
                self._limiter = await to_thread.run_sync(_limiter, request.state.hypersam.redis)
            if await to_thread.run_sync(self._limiter.hit, limit, who):
                return None
            stats = await to_thread.run_sync(self._limiter.get_window_stats, limit, who)
        except redis.RedisError as error:
            # A limit that nobody counts is none.
            log.warning("redis: %s", error)
            return problem(
                503, Unavailable.code, "the queue's Redis does not answer", headers={"Retry-After": "5", **_UNREAD}
            )
        wait = max(1, math.ceil(stats.reset_time - time.time()))
        detail = f"more than {limit}; try again in {wait} s"
        return problem(429, "rate_limited", detail, headers={"Retry-After": str(wait), **_UNREAD})


def _limiter(connection: redis.Redis) -> MovingWindowRateLimiter:
    """Counts through the connections that the service has anyway."""
    storage = RedisStorage("redis://", connection_pool=connection.connection_pool, key_prefix="hypersam:rate")
    return MovingWindowRateLimiter(storage)


def _scheme(request: Request) -> tuple[str, str]:
    """The scheme of Authorization, in small letters, and what follows it."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return scheme.lower(), value.strip()


def _secret(request: Request) -> str:
    scheme, value = _scheme(request)
    if scheme == "bearer":
        return value
    # Before Basic: a proxy in front may ask for a name and password of its own.
    if key := request.headers.get("x-api-key"):
        return key
    return _basic(value) if scheme == "basic" else ""


def _basic(value: str) -> str:
    """The password of a Basic credential, or the name where there is none; nothing of what is no credential."""
    try:
        name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return ""
    return password or name


def _challenge(request: Request) -> str:
    """Basic is named to those alone who came with it: at its name browsers open a window of their own over the page."""
    bearer = 'Bearer realm="hypersam"'
    return f'{bearer}, Basic realm="hypersam", charset="UTF-8"' if _scheme(request)[0] == "basic" else bearer


def secured(keys: Sequence[ApiKey]) -> dict[str, object]:
    """What the OpenAPI document says of keys."""
    if not keys:
        return {}
    return {"key": {"type": "http", "scheme": "bearer", "description": "an API key; X-API-Key works too, and Basic"}}
