"""Clients that are slow, rude or wrong. Each gets a problem or a closed connection; the service goes on."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from service.connection import MAX_HEAD_BYTES
from tests import fuzz_api
from tests.service.running import Api, assert_problem, picture

JSON = {"Content-Type": "application/json"}


def test_requests_made_from_the_document_get_answers_that_fit_it(api: Api, model: str) -> None:
    """A few hundred here; ``make fuzz`` sends thousands."""
    sent, report = fuzz_api.rounds(api, model, 300)
    assert not report, report
    assert sent >= 300


def connection(api: Api) -> socket.socket:
    address = urlsplit(api.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def answer(api: Api, *pieces: bytes, end: bool = True) -> bytes:
    """All that comes back for some bytes, until the service closes or says no more. ``end``: say that no more will be
    sent, which may come before the answer is made and then ends it."""
    received = b""
    with (
        connection(api) as link,
        contextlib.suppress(ConnectionError, OSError),
    ):  # closed, or reset, before all was sent
        for piece in pieces:
            link.sendall(piece)
        if end:
            link.shutdown(socket.SHUT_WR)
        while block := link.recv(1 << 16):
            received += block
    return received


def alive(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(20_000)) + b"\r\n",
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\nhello",
        b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
        b"POST /segment HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n",
    ],
    ids=range(10),
)
def test_requests_that_are_no_http(api: Api, request_bytes: bytes) -> None:
    status = answer(api, request_bytes).split(b" ")[1:2]
    assert status in ([], [b"400"], [b"404"], [b"413"], [b"414"], [b"415"], [b"431"])
    alive(api)


def padded(size: int, *, pad: bytes = b"a", last: bool = True) -> bytes:
    """A request of ``size`` bytes."""
    start = b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + b"Connection: close\r\n" * last + b"X: "
    return start + pad * (size - len(start) - 5) + b"a\r\n\r\n"


@pytest.mark.parametrize("pad", [b"a", b" "], ids=["value", "spaces"])
def test_heads_are_counted_to_the_byte(api: Api, pad: bytes) -> None:
    assert answer(api, padded(MAX_HEAD_BYTES, pad=pad), end=False).startswith(b"HTTP/1.1 200")
    assert answer(api, padded(MAX_HEAD_BYTES + 1, pad=pad), end=False).startswith(b"HTTP/1.1 431")
    for size in (102_400, 190_000):
        received = answer(api, padded(size, pad=pad), end=False)
        # The system may drop the answer, since we sent what was not read.
        assert received.startswith(b"HTTP/1.1 431") or not received


def test_heads_that_come_behind_others_are_counted(api: Api) -> None:
    """In one piece with a request before, of which the parser alone knows where it ends."""
    body = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n123456789"
    chunks = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
    target = padded(400).replace(b"/healthz", b"/healthz?" + b"q" * 70_000)
    many = padded(60).replace(b"X: ", b"".join(b"X-%d: a\r\n" % i for i in range(9000)) + b"X: ")
    for first in (padded(60, last=False), body, chunks):
        received = answer(api, first + padded(60_000, last=False) + padded(100), end=False)
        assert re.findall(rb"HTTP/1.1 (\d+)", received)[1:] == [b"200", b"200"]
        for large in (padded(102_400), target, many):
            statuses = re.findall(rb"HTTP/1.1 (\d+)", answer(api, first + large, end=False))
            # That of the first, if it was there in time, and the refusal, if the system has not dropped it.
            assert [status for status in statuses if status != b"431"] in ([], [b"200"], [b"404"])
    trailers = chunks.replace(b"/nowhere", b"/segment").removesuffix(b"\r\n") + b"X: " + b"a" * 100_000 + b"\r\n\r\n"
    assert answer(api, trailers, end=False).split(b" ")[1:2] in ([], [b"415"], [b"431"])
    alive(api)


GOODBYE = b"GET /models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
UPGRADES = {
    "other": b"Connection: Upgrade\r\nUpgrade: foo\r\n",
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n",
    "websocket": b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YQ==\r\n"
                 b"connection: keep-alive,upgrade\r\n",
    "last": b"Connection: close, Upgrade\r\nUPGRADE:foo\r\nUpgrade: bar\r\n",
}  # fmt: skip


def asking(upgrade: bytes, body: bytes, *, chunked: bool = False) -> tuple[bytes, bytes]:
    """The head and the body of a request that gets 422."""
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    head = b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + framing + b"\r\n"
    return head + upgrade + b"\r\n", sent


def exchange(api: Api, *pieces: bytes) -> list[tuple[bytes, bytes]]:
    """The statuses and bodies that come for pieces which the service gets one by one. The last asks for the end."""
    with connection(api) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            link.sendall(piece)
            time.sleep(0.05)
        received = b""
        while block := link.recv(1 << 16):
            received += block
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length, head
        answers.append((head.split(b" ")[1], received[: int(length[1])]))
        received = received[int(length[1]) :]
    return answers


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_a_body_is_a_body_where_an_upgrade_is_asked_for(api: Api, upgrade: bytes, chunked: bool) -> None:
    """Nothing is changed to, and no request can be hidden in it from a proxy in front."""
    last = b"" if b"close" in upgrade else GOODBYE
    for body in (b"GET /models HTTP/1.1\r\nHost: a\r\n\r\n", b" " * (100 << 10) + b'{"model":1}'):
        (status, told), *others = exchange(api, b"".join(asking(b"", body, chunked=chunked)) + GOODBYE)
        assert [status, *(after for after, _ in others)] == [b"422", b"200"]
        expected = [(status, unnumbered(told)), *others[: len(last)]]
        head, sent = asking(upgrade, body, chunked=chunked)
        for pieces in ([head + sent + last], [head, sent + last], [head[:90], head[90:] + sent, last]):
            (status, told), *others = exchange(api, *pieces)
            assert [(status, unnumbered(told)), *others] == expected


def unnumbered(problem: bytes) -> dict[str, object]:
    """Without what differs from request to request."""
    return {name: value for name, value in json.loads(problem).items() if name != "request_id"}


def test_requests_behind_those_that_ask_for_an_upgrade(api: Api) -> None:
    before = len(api.output())  # other tests' requests, and jobs that were to fail, are in it too
    upgrade = b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + UPGRADES["websocket"] + b"\r\n"
    for pieces in ([upgrade + GOODBYE], [upgrade, GOODBYE], [upgrade[:50], upgrade[50:] + GOODBYE]):
        (status, told), (after, models) = exchange(api, *pieces)
        assert (status, json.loads(told)) == (b"200", {"status": "ok"})
        assert (after, list(json.loads(models))) == (b"200", ["models"])
    # What follows the last request is nothing, and not an error that takes the place of the answer.
    last = b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + UPGRADES["last"] + b"\r\n"
    assert exchange(api, last + GOODBYE) == [(b"200", b'{"status":"ok"}')]
    # The parser is not entered once more for each.
    assert [status for status, _ in exchange(api, upgrade * 1000 + GOODBYE)] == [b"200"] * 1001
    log = api.output()[before:]
    assert "pip install" not in log
    assert "Traceback" not in log


def test_heads_that_ask_for_an_upgrade_are_counted(api: Api) -> None:
    for size, status in ((MAX_HEAD_BYTES, b"200"), (MAX_HEAD_BYTES + 1, b"431"), (102_400, b"431")):
        upgrade = b"Connection: close, Upgrade\r\nUpgrade: foo\r\n"
        request = padded(size - len(upgrade) + len(b"Connection: close\r\n")).replace(b"Connection: close\r\n", upgrade)
        assert len(request) == size
        received = answer(api, request, end=False)
        # The system may drop the answer, since we sent what was not read.
        assert received.split(b" ")[1:2] == [status] or (size > MAX_HEAD_BYTES and not received)


def test_tunnels_are_refused(api: Api) -> None:
    hidden = b"GET /models HTTP/1.1\r\nHost: a\r\n\r\n"
    for headers in (b"", UPGRADES["h2c"], b"Content-Length: %d\r\n" % len(hidden)):
        connect = b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n" + headers + b"\r\n"
        for pieces in ([connect], [connect + hidden]):
            [(status, told)] = exchange(api, *pieces)
            assert (status, json.loads(told)["code"]) == (b"400", "bad_http")
    alive(api)


@pytest.mark.parametrize("path", ["/models/", "/jobs/", "/segment/", "/static", "/static/assets", "//evil.example/.."])
def test_nobody_is_sent_to_the_host_that_the_client_named(api: Api, path: str) -> None:
    named = "Host: evil.example\r\nX-Forwarded-Host: evil.example\r\n"
    received = answer(api, f"GET {path} HTTP/1.1\r\n{named}Connection: close\r\n\r\n".encode(), end=False)
    assert received.split(b" ")[1] in (b"404", b"405"), received
    assert b"location" not in received.partition(b"\r\n\r\n")[0].lower()
    assert b"application/problem+json" in received
    assert b"evil.example" not in received


def test_a_new_job_is_named_without_a_host(api: Api, checkpoint: Path) -> None:
    response = api.http.post(
        "/compress", headers={"Host": "evil.example"}, files={"file": ("hosted.pth", checkpoint.read_bytes())},
        data={"codec": "birkhoff", "fidelity": "false"},
    )  # fmt: skip
    assert response.status_code == 202
    assert response.headers["location"] == f"/jobs/{response.json()['id']}"
    api.wait_job(response.json()["id"])


@pytest.mark.parametrize("path", ["/compress", "/plan", "/segment"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_bodies_shorter_than_they_say(api: Api, path: str, kind: str) -> None:
    """The client goes away before its body is whole: nothing is done, nothing stays."""
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.pth"\r\n\r\nPK\x03\x04' + bytes(100)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 1000000\r\n\r\n"
    with connection(api) as link:
        link.sendall(head.encode() + body)
    alive(api)
    deadline = time.monotonic() + 5
    while list((api.settings.data_dir / "uploads").glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("length", ["abc", "1e9", "99999999999999999999", "", "+5", "٣"])
def test_lengths_that_are_no_numbers(api: Api, length: str) -> None:
    head = (
        f"POST /compress HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    )
    received = answer(api, head.encode(), b"--b--\r\n")
    assert received.split(b" ")[1:2] in ([], [b"400"], [b"413"], [b"422"])
    alive(api)


def test_a_body_longer_than_it_says(api: Api) -> None:
    """What follows is another request, and a bad one."""
    body = b'{"source":{"upload":"' + b"0" * 64 + b'"}}'
    head = b"POST /compress HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    received = answer(api, head + body + b"and more of it\r\n\r\n")
    statuses = re.findall(rb"HTTP/1.1 (\d+)", received)
    assert statuses in ([b"400"], [b"404", b"400"])
    alive(api)


def test_slow_clients_do_not_hold_others_up(api: Api, model: str) -> None:
    """A hundred clients that send a byte now and then, while ordinary ones are answered."""
    head = b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    slow = [connection(api) for _ in range(100)]
    try:
        for number, link in enumerate(slow):
            link.sendall(head[:40] if number % 2 else head)
        for _ in range(5):
            for number, link in enumerate(slow):
                link.sendall(b"X" if number % 2 == 0 else b"")
            alive(api)
            response = api.http.post(
                "/segment", files={"image": picture()}, data={"model": model, "points": "[[5, 5]]"}, timeout=20
            )
            assert response.status_code == 200
    finally:
        for link in slow:
            link.close()
    alive(api)


def test_a_million_points(api: Api, model: str) -> None:
    image = base64.b64encode(picture()).decode()
    points = [[1, 2]] * 1_000_000
    for prompts, code in (
        ([{"points": points, "point_labels": [1] * len(points)}], "bad_prompt"),
        ([{"points": [[1, 2]], "point_labels": [1]}] * 100_000, "bad_prompt"),
        ([{"points": [["x", 2]] * 300_000}], "invalid_request"),
        ([{}] * 200_000, "invalid_request"),
    ):
        body = json.dumps({"model": model, "image": image, "prompts": prompts}).encode()
        response = api.http.post("/segment", content=body, headers=JSON)
        assert response.status_code in (413, 422)
        assert_problem(response, response.status_code, "image_too_large" if response.status_code == 413 else code)
        assert len(response.content) < 10_000
    for path in ("/segment", "/segment/everything", "/embed", "/api/generate", "/predict"):
        # More values than are read, whatever they are; lists and objects in each other need no commas.
        for many in (b"," * 4_400_001, b"[[]]," * 900_000, b"[" * 2_200_001):
            problem = assert_problem(api.http.post(path, content=many, headers=JSON), 422, "invalid_request")
            assert "more than 4400000 values" in problem["detail"]
    form = {"model": model, "points": json.dumps(points[:100_000])}
    response = api.http.post("/segment", files={"image": picture()}, data=form)
    assert_problem(response, 422, "bad_prompt")
    # Each field may have four megabytes; together they have no more values than JSON.
    lists = "[" + "[[[[]]]]," * 130_000 + "[]]"
    form = {"model": model} | dict.fromkeys(("points", "labels", "box", "prompts"), lists)
    response = api.http.post("/segment", files={"image": picture()}, data=form)
    assert "more than 4400000 values" in assert_problem(response, 422, "invalid_request")["detail"]


@pytest.mark.parametrize("path", ["/segment", "/compress", "/plan"])
def test_deep_json(api: Api, path: str) -> None:
    for body in (b"[" * 100_000, b'{"a":' * 100_000, b'{"options":' + b"[" * 500_000 + b"]" * 500_000 + b"}"):
        response = api.http.post(path, content=body, headers=JSON)
        assert_problem(response, 422, "invalid_request")
        assert len(response.content) < 5_000
    form = {"model": "x", "points": "[" * 100_000} if path == "/segment" else {"options": "[" * 100_000}
    response = api.http.post(path, files={"image" if path == "/segment" else "file": b"PK\x03\x04"}, data=form)
    assert response.status_code == 422


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "-0", "1e-400"])
def test_strange_numbers(api: Api, model: str, value: str) -> None:
    image = base64.b64encode(picture()).decode()
    body = f'{{"model":"{model}","image":"{image}","prompts":[{{"points":[[{value},1]],"point_labels":[1]}}]}}'
    response = api.http.post("/segment", content=body, headers=JSON)
    assert response.status_code in (200, 422), response.text
    ratio = api.http.post("/compress", content=f'{{"source":{{"known":"x"}},"target_ratio":{value}}}', headers=JSON)
    assert ratio.status_code in (403, 422), ratio.text
    form = {"model": model, "points": f"[[{value}, 1]]"}
    assert api.http.post("/segment", files={"image": picture()}, data=form).status_code in (200, 422)


TRICKS = (
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "....//", "..\\..\\", "a%00b", "%00", "\u202e", "con",
    ".", "..", "~root", "a/b", "models.lock", "-rf", "$(id)", "`id`", "a\r\nSet-Cookie: b", "x" * 5000, "%ff%fe", "٣",
    " a", "a ",
)  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_names_that_are_paths(api: Api, name: str) -> None:
    upload = httpx.Request(
        "POST",
        f"{api.url}/compress",
        files={"file": (name, b"no checkpoint at all")},
        data={"name": name, "codec": "birkhoff"},
    )
    assert api.http.send(upload).status_code in (400, 422)
    quoted = httpx.URL(api.url).copy_with(raw_path=b"/models/" + httpx.QueryParams({"n": name}).__str__()[2:].encode())
    for url in (quoted, f"{quoted}/artifact") if name.strip(".") else ():  # httpx resolves dots itself
        response = api.http.get(url)
        assert response.status_code in (404, 405), (url, response.text)
    assert api.http.delete(quoted).status_code in (404, 405)
    body = {
        "model": name,
        "image": base64.b64encode(picture()).decode(),
        "prompts": [{"points": [[1, 1]], "point_labels": [1]}],
    }
    assert_problem(api.http.post("/segment", json=body), 404, "unknown_model")
    alive(api)


def test_paths_cannot_write_lines_of_their_own_into_the_log(api: Api) -> None:
    raw = b"/models/a%0a2026-01-01%20ERROR%20forged%1b[31m" + b"x" * 5000
    response = api.http.send(httpx.Request("GET", httpx.URL(api.url).copy_with(raw_path=raw)))
    assert_problem(response, 404, "unknown_model")
    deadline = time.monotonic() + 5
    while "forged" not in (log := api.output()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = [line for line in log.splitlines() if "forged" in line]
    assert all(r"/models/a\n2026-01-01 ERROR forged\x1b[31m" in line and len(line) < 500 for line in found)


def test_requests_by_the_thousand(api: Api) -> None:
    def ask(number: int) -> int:
        return api.http.get(("/healthz", "/models", "/jobs?limit=1", "/nowhere")[number % 4]).status_code

    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(ask, range(3000)))
    assert [statuses.count(status) for status in (200, 404)] == [2250, 750]


def test_segmenting_beyond_the_queue_is_refused_politely(api: Api, model: str) -> None:
    image = picture()

    def ask(number: int) -> int:
        response = api.http.post(
            "/segment", files={"image": image}, data={"model": model, "points": f"[[{number % 90}, 5]]"}, timeout=120
        )
        if response.status_code == 503:
            assert_problem(response, 503, "overloaded")
            assert response.headers["retry-after"]
        return response.status_code

    with ThreadPoolExecutor(90) as pool:
        statuses = set(pool.map(ask, range(300)))
    assert statuses <= {200, 503}
    assert 200 in statuses
    alive(api)


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=abc"}, {"Range": "bytes=5-1"}, {"Range": "bytes=-0"},
        {"Range": "bytes=" + "0-0," * 2000 + "1-1"},
        {"If-None-Match": '"' * 5000}, {"If-Range": "x", "Range": "bytes=0-1"}, {"Accept": "a/b;" * 2000},
        {"Last-Event-ID": "x" * 5000}, {"Content-Type": "multipart/form-data; boundary=" + "b" * 5000},
        {"Content-Type": "multipart/form-data; boundary=\x01"}, {"Content-Type": 'multipart/form-data; boundary="'},
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_make_no_sense(api: Api, model: str, headers: dict[str, str]) -> None:
    for method, path in (("GET", f"/models/{model}/artifact"), ("GET", "/jobs/x/events"), ("POST", "/segment")):
        response = api.http.request(method, path, headers=headers, content=b"--b" if method == "POST" else None)
        assert response.status_code < 500, (path, response.text)
    alive(api)
