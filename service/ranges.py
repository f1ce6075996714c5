"""Files of which a part may be asked for, as RFC 9110 has it.

The framework answers a Range that it does not understand with plain text and 400; it is to be passed over, though.
"""

from __future__ import annotations

import os
import re
from typing import Any

from fastapi.responses import FileResponse
from starlette.datastructures import MutableHeaders
from starlette.types import Receive, Scope, Send

from service.errors import problem

MOST_RANGES = 100
_RANGE = re.compile(r"([0-9]{0,18})-([0-9]{0,18})")  # no file has more bytes than that, and digits cost time


def ranges_of(header: str, size: int) -> list[tuple[int, int]] | None:
    """First and last byte of what a Range header asks for of ``size`` bytes, without what is not there at all.

    None where the header means nothing, or names more ranges than anybody needs: then the whole is to be sent.
    """
    unit, _, listed = header.partition("=")
    parts = [part for each in listed.split(",") if (part := each.strip(" \t"))]
    if unit.strip(" \t").lower() != "bytes" or not 0 < len(parts) <= MOST_RANGES:
        return None
    found = []
    for part in parts:
        match = _RANGE.fullmatch(part)
        if match is None or part == "-":
            return None
        if not match[1]:  # so many at the end
            first, last = max(0, size - int(match[2])), size - 1
        else:
            first, last = int(match[1]), int(match[2] or size)
            if match[2] and last < first:
                return None
        if first < size:
            found.append((first, min(last, size - 1)))
    return found


class RangedFile(FileResponse):
    """A file; for GET with Range that part, unless If-Range names another file, or 416 as a problem."""

    def __init__(self, path: str | os.PathLike[str], found: os.stat_result, **named: Any) -> None:
        super().__init__(path, stat_result=found, **named)
        self._bytes = found.st_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: rewrite its Range so that the framework understands it, or leave it out."""
        scope = dict(scope)
        headers = MutableHeaders(scope=scope)
        asked = headers.get("range")
        del headers["range"]
        this = (None, self.headers["etag"], self.headers["last-modified"])
        if asked is not None and scope["method"] == "GET" and headers.get("if-range") in this:
            found = ranges_of(asked, self._bytes)
            if found == []:
                detail = f"{asked[:64]!r} is beyond the {self._bytes} bytes that there are"
                answer = problem(
                    416, "range_not_satisfiable", detail, headers={"Content-Range": f"bytes */{self._bytes}"}
                )
                await answer(scope, receive, send)
                return
            if found is not None:
                headers["range"] = "bytes=" + ",".join(f"{first}-{last}" for first, last in found)
        await super().__call__(scope, receive, send)
