"""docs/errors.md lists every code with the status that it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hypersam import errors
from service import label_studio  # noqa: F401 (errors of all modules are to be known)
from service.errors import _HTTP_CODES, status_of

TEXT = (Path(__file__).parents[2] / "docs/errors.md").read_text()
NEVER_OVER_HTTP = {"cancelled", "fetch_failed", "wrong_hash", "worker_lost"}
NO_CLASS = {
    "unauthorized": 401, "forbidden": 403, "rate_limited": 429, "client_disconnected": 400, "head_too_large": 431,
    "bad_http": 400, "internal_error": 500, "worker_lost": None,
}  # fmt: skip


def kinds(of: type[errors.HypersamError]) -> Iterator[type[errors.HypersamError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_the_list_is_whole() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+|–) \|", TEXT, re.MULTILINE))
    known = {kind.code: status_of(kind("")) for kind in kinds(errors.HypersamError)}
    known |= {code: status for status, code in _HTTP_CODES.items()} | NO_CLASS  # type: ignore[operator]
    assert rows == {code: "–" if code in NEVER_OVER_HTTP else str(status) for code, status in known.items()}
    assert list(rows) == sorted(rows)
