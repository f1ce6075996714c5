"""The page at ``/`` and what it is made of: plain files, no build step, nothing from other hosts."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Scope

import hypersam
from service.ranges import RangedFile

STATIC = Path(__file__).parent / "static"
CARRIED = Path(hypersam.__file__).parent / "assets"
"""The pictures and the small SAM that come with the package: the page's samples."""

_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Names stay the same from release to release, so a browser asks each time, and is told that nothing changed.
    "Cache-Control": "no-cache",
}
# The table of the machine knows them by other names, or not at all.
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".pth": "application/octet-stream"}


class PageFiles(StaticFiles):
    """Files with the page's headers and with types that do not depend on the machine; 304 where the ETag is known."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file, 304, or raise HTTPException 404 or 405."""
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        kind = _TYPES.get(Path(path).suffix)
        if kind and not isinstance(response, NotModifiedResponse):
            response.headers["content-type"] = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        return response

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """Return a file or 304."""
        response = RangedFile(full_path, stat_result, status_code=status_code)
        if self.is_not_modified(response.headers, Headers(scope=scope)):
            return NotModifiedResponse(response.headers)
        return response

    def is_not_modified(self, response_headers: Headers, request_headers: Headers) -> bool:
        """By the ETag alone: a date counts in seconds, and an update may be within one."""
        if "if-none-match" not in request_headers:
            return False
        return super().is_not_modified(response_headers, request_headers)


def install(app: FastAPI) -> None:
    """Serve the page at ``/``, the interface's description at ``/docs``, and their parts below ``/static``."""
    files = PageFiles(directory=STATIC)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs(request: Request) -> Response:
        return await files.get_response("docs.html", request.scope)

    app.mount("/static/assets", PageFiles(directory=CARRIED))
    app.mount("/static", files)
