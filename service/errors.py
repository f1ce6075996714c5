"""Every error as an RFC 9457 problem document, by one table from exception to status."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import redis
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hypersam import errors

log = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"


class RequestError(errors.HypersamError):
    """The request does not follow the contract."""

    code = "invalid_request"


class BadMultipart(RequestError):
    """The body is no multipart form, or ends before its last boundary."""

    code = "bad_multipart"


class UnsupportedMedia(RequestError):
    """A body of a type that the route does not take."""

    code = "unsupported_media_type"


class BodyTooLarge(RequestError):
    """A JSON body or a form field larger than any sensible one."""

    code = "body_too_large"


class RequestTooSlow(RequestError):
    """The request, its head or its body, comes so slowly that it would hold a place here for ever."""

    code = "request_timeout"


class NotAcceptable(RequestError):
    """The answer cannot be given in the form that Accept asks for."""

    code = "not_acceptable"


# The first row that fits decides, so subclasses stand before their bases.
STATUS: Sequence[tuple[type[BaseException], int]] = (
    (BadMultipart, 400),
    (RequestTooSlow, 408),
    (NotAcceptable, 406),
    (UnsupportedMedia, 415),
    (BodyTooLarge, 413),
    (RequestError, 422),
    (errors.UploadTooLarge, 413),
    (errors.ImageTooLarge, 413),
    (errors.UnknownModel, 404),
    (errors.UnknownJob, 404),
    (errors.UnknownImage, 404),
    (errors.UnknownUpload, 404),
    (errors.NameTaken, 409),
    (errors.SourceNotAllowed, 403),
    (errors.CheckpointError, 422),
    (errors.InvalidOption, 422),
    (errors.InvalidName, 422),
    (errors.ImageError, 422),
    (errors.PromptError, 422),
    (errors.StoreFull, 507),
    (errors.Unavailable, 503),
    (errors.JobCancelled, 409),
    (errors.ArtifactError, 500),
    (errors.HypersamError, 400),
    (redis.RedisError, 503),  # it does not answer, or refuses: its memory or its disk is full, it is loading
    (ClientDisconnect, 400),
)

_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    416: "range_not_satisfiable",
}


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an exception; 500 for one that is not in the table."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def problem(status: int, code: str, detail: str, *, headers: dict[str, str] | None = None,
            **more: Any) -> JSONResponse:  # fmt: skip
    """Return a problem document. ``code`` is stable and for programs, ``detail`` is for people."""
    body = {
        "type": f"urn:hypersam:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": _sendable(detail),
        "code": code,
        **more,
    }
    return JSONResponse(body, status, headers=headers, media_type=PROBLEM_TYPE)


def _sendable(text: str) -> str:
    """The text as UTF-8 can carry it: half of a surrogate pair, which JSON can hold in a name, is spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


async def _known(_: Request, error: Exception) -> Response:
    return answer(error)


def answer(error: Exception) -> Response:
    """Return the problem document of an error of this program, of Redis, or of a client that went away."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if status == 503:
        headers["Retry-After"] = str(getattr(error, "retry_after", 5))
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    if isinstance(error, redis.RedisError):
        log.warning("redis: %s", error)
        silent = isinstance(error, redis.ConnectionError | redis.TimeoutError)
        detail = "the queue's Redis does not answer" if silent else "the queue's Redis refuses to work"
        return problem(status, errors.Unavailable.code, detail, headers=headers)
    if isinstance(error, ClientDisconnect):
        return problem(status, "client_disconnected", "the client went away")
    if status >= 500:
        # 503 is what a service says that has enough to do, or stops.
        log.log(logging.WARNING if status == 503 else logging.ERROR, "%s: %s", type(error).__name__, error)
    code = error.code if isinstance(error, errors.HypersamError) else "error"
    field = getattr(error, "field", None)
    more = {"errors": [{"loc": field.split("."), "msg": _sendable(str(error))}]} if field else {}
    return problem(status, code, str(error), headers=headers, **more)


async def _validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [
        {"loc": [_sendable(str(part)) for part in e["loc"]] or ["body"], "msg": _sendable(e["msg"])}
        for e in error.errors()
    ]
    detail = "; ".join(f"{'.'.join(e['loc'])}: {e['msg']}" for e in found[:5])
    return problem(422, RequestError.code, detail, errors=found[:50])


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, f"http_{error.status_code}")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request))) or headers.get("Allow", "")
    return problem(error.status_code, code, str(error.detail), headers=headers)


def _methods(request: Request) -> set[str]:
    """Every method that the path has: the framework names those of the first route alone."""
    found: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\\{[^/]+\\}", "[^/]+", re.escape(path)), request.url.path):
            found |= {method.upper() for method in operations}
    return found


async def _unexpected(_: Request, error: Exception) -> Response:
    return unexpected()


def unexpected() -> Response:
    """Return the problem document of an error that nobody foresaw: nothing of it leaves the service."""
    return problem(500, "internal_error", "something went wrong here; the service's log tells what")


def install(app: FastAPI) -> None:
    """Let every error of ``app`` leave as a problem document."""
    for kind in (errors.HypersamError, redis.RedisError, ClientDisconnect):
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
