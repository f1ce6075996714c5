"""Clients that dawdle, over real sockets: each gets 408 or is cut off, and leaves nothing. Slow ones get through."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hypersam.settings import Settings
from service.connection import MAX_HEAD_BYTES
from tests.service.running import Api

FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.pth"\r\n\r\nPK\x03\x04'
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
JSON = "application/json"
PATIENCE = 30.0  # how long a test waits for what the service should do within a second or two


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service whose patience is a second."""
    data = tmp_path_factory.mktemp("data")
    settings = Settings(
        data_dir=data, port=0, workers=0, device="cpu", register_default=False, header_timeout=1, body_timeout=1,
        body_window=1, min_rate=1000, send_timeout=1,
    )  # fmt: skip
    # An artifact that is larger than what the system takes in for a client that does not read.
    service = Api(settings)
    (data / "artifacts" / "big.hsam").write_bytes(bytes(64 << 20))
    record = {"name": "big", "digest": "big", "bytes": 64 << 20, "request": "r", "source_sha256": "s", "created": ""}
    (data / "models" / "big.json").write_text(json.dumps(record))
    try:
        yield service
    finally:
        service.stop()


@contextlib.contextmanager
def connected(api: Api, *, buffer: int | None = None) -> Iterator[socket.socket]:
    address = urlsplit(api.url)
    with socket.socket() as link:
        if buffer is not None:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        link.settimeout(PATIENCE)
        link.connect((address.hostname, address.port))
        yield link


def all_of(link: socket.socket) -> bytes:
    """What still comes until the service ends the connection. Fails if it does not end it."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while block := link.recv(1 << 16):
            received += block
    return received


def drip(link: socket.socket, pieces: Iterable[bytes], every: float) -> None:
    """Send on from a thread of its own until the service has had enough."""

    def send() -> None:
        with contextlib.suppress(OSError):
            for piece in pieces:
                link.sendall(piece)
                time.sleep(every)

    threading.Thread(target=send, daemon=True).start()


def endless(piece: bytes) -> Iterator[bytes]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        yield piece


def head(path: str = "/compress", kind: str = "multipart/form-data; boundary=b", length: int = 1 << 30) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def is_problem(answer: bytes, status: int, code: str) -> None:
    start, _, body = answer.partition(b"\r\n\r\n")
    assert start.split()[1] == b"%d" % status, answer
    assert b"content-type: application/problem+json" in start
    assert b"connection: close" in start.lower()
    assert json.loads(body)["code"] == code


def left(api: Api) -> list[Path]:
    return [path for folder in ("uploads", "work") for path in (api.settings.data_dir / folder).iterdir()]


def soon(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /mod", b""), (b"GET /mod", b"x"), (b"GET /models HTTP/1.1\r\nHost: a\r\nX-A: ", b"x"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n", b"X-A: b\r\n"),
    ],
    ids=["silent", "in the line", "in a header", "header by header"],
)  # fmt: skip
def test_a_head_that_does_not_end(hasty: Api, begin: bytes, more: bytes) -> None:
    with connected(hasty) as link:
        link.sendall(begin)
        if more:
            drip(link, endless(more), 0.1)
        is_problem(all_of(link), 408, "request_timeout")


def test_a_connection_on_which_nothing_is_asked(hasty: Api) -> None:
    with connected(hasty) as link:
        assert all_of(link) == b""


def test_line_ends_are_no_request(hasty: Api) -> None:
    """After an answer too, where they would keep the connection alive."""
    with connected(hasty) as link:
        link.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        drip(link, endless(b"\r\n"), 0.1)
        answer = all_of(link)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") <= 2


@pytest.mark.parametrize("piece", [b"X-A: " + b"b" * 1000 + b"\r\n", b"b" * 1000], ids=["headers", "one header"])
def test_a_head_without_end_is_too_large(hasty: Api, piece: bytes) -> None:
    with connected(hasty) as link:
        link.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-B: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(2 * MAX_HEAD_BYTES // len(piece)):
                link.sendall(piece)
        answer = all_of(link)
        if answer:  # the system may drop it, since we sent what was not read
            is_problem(answer, 431, "head_too_large")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *((path, kind) for path in ("/compress", "/segment") for kind in (JSON, "multipart/form-data; boundary=b")),
        ("/predict", JSON),
    ],
)
def test_a_body_that_stops(hasty: Api, path: str, kind: str) -> None:
    with connected(hasty) as link:
        link.sendall(head(path, kind, 1000) + (FORM if "form" in kind else b'{"a":'))
        is_problem(all_of(link), 408, "request_timeout")
    assert soon(lambda: not left(hasty)), left(hasty)


def test_one_byte_at_a_time_does_not_hold_an_upload(hasty: Api) -> None:
    with connected(hasty) as link:
        link.sendall(head() + FORM)
        drip(link, endless(b"x"), 0.1)
        assert soon(lambda: bool(left(hasty)))
        is_problem(all_of(link), 408, "request_timeout")
    assert soon(lambda: not left(hasty)), left(hasty)


def test_a_chunk_whose_extension_does_not_end(hasty: Api) -> None:
    with connected(hasty) as link:
        link.sendall(b"POST /compress HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n5;")  # fmt: skip
        drip(link, endless(b"x" * 100), 0.01)
        is_problem(all_of(link), 408, "request_timeout")


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["alone", "behind another"])
def test_a_refused_body_is_not_read_for_ever(hasty: Api, before: bytes) -> None:
    """404 comes before the body; what follows must not keep the connection."""
    with connected(hasty) as link:
        link.sendall(before + head("/nowhere", "text/plain"))
        drip(link, endless(b"x"), 0.1)
        assert re.findall(rb"HTTP/1.1 (\d+)", all_of(link))[-1] == b"404"


def test_what_is_no_http_gets_a_problem_too(hasty: Api) -> None:
    for begin in (b"nonsense\r\n\r\n", b"POST /plan HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"):
        with connected(hasty) as link:
            link.sendall(begin)
            is_problem(all_of(link), 400, "bad_http")


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["alone", "behind another"])
def test_slow_but_steady_passes(hasty: Api, before: bytes) -> None:
    """Three seconds at three times the least rate: longer than every time that is set."""
    body = b"x" * 9000
    form = FORM + body + b"\r\n--b--\r\n"
    with connected(hasty) as link:
        link.sendall(before + head(length=len(form)))
        answer = b""
        while before and not answer.endswith(b'{"status":"ok"}'):
            block = link.recv(1 << 16)
            assert block, answer
            answer += block
        for start in range(0, len(form), 300):
            link.sendall(form[start : start + 300])
            time.sleep(0.1)
        link.settimeout(PATIENCE)
        answer = link.recv(1 << 16)
    assert answer.split()[1] == b"422", answer  # read to its end, and found to be no checkpoint
    assert b"not_a_checkpoint" in answer
    assert not left(hasty)


def test_an_answer_that_nobody_takes(hasty: Api) -> None:
    """The connection is cut, so that the client sees a broken transfer."""
    with connected(hasty, buffer=1 << 14) as link:
        link.sendall(b"GET /models/big/artifact HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(3)
        assert len(all_of(link)) < 64 << 20


def test_an_answer_taken_slowly_comes_whole(hasty: Api) -> None:
    with connected(hasty, buffer=1 << 14) as link:
        link.sendall(
            b"GET /models/big/artifact HTTP/1.1\r\nHost: a\r\nRange: bytes=0-9999999\r\nConnection: close\r\n\r\n"
        )
        received = 0
        for _ in range(12):
            received += len(link.recv(1 << 18))
            time.sleep(0.2)
        received += len(all_of(link))
    assert received > 10_000_000
