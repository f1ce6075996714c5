"""Where a Label Studio task's picture is fetched from, and from where it is not; redirects and the token."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hypersam.errors import ImageError, ImageTooLarge, SourceNotAllowed
from hypersam.settings import Settings
from service.label_studio import pictures
from service.label_studio.pictures import MOST_REDIRECTS, fetch
from tests.service.running import Api, assert_problem, picture

SIGNED = "/bucket/a.png?X-Amz-Signature=abc%2Fdef"


class _Files(BaseHTTPRequestHandler):
    """Label Studio's file server with its token, or an object store, which takes a signature and no token."""

    token: str | None
    elsewhere: str  # where /tasks/1/resolve/ sends to
    seen: list[tuple[str, str | None, str | None]]  # path, Authorization, Cookie

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        self.seen.append((self.path, given, self.headers.get("Cookie")))
        path, _, _ = self.path.partition("?")
        if given != self.token:
            self.send_error(400 if self.token is None else 401)
        elif path in ("/data/upload/1/a.png", "/bucket/a.png"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture())
        elif path == "/tasks/1/resolve/":
            self._moved(303, self.elsewhere)
        elif path.startswith("/hops/"):
            left = int(path.removeprefix("/hops/"))
            self._moved(302, f"/hops/{left - 1}" if left else "/data/upload/1/a.png")
        elif path == "/round":
            self._moved(307, "/round")
        elif path == "/nowhere":
            self.send_response(302)
            self.end_headers()
        elif path == "/drop":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        else:
            self.send_error(404)

    def _moved(self, status: int, where: str) -> None:
        self.send_response(status)
        self.send_header("Location", where)
        self.send_header("Set-Cookie", "sessionid=secret; Path=/")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(token: str | None) -> Iterator[tuple[str, type[_Files]]]:
    handler = type("Handler", (_Files,), {"token": token, "elsewhere": "", "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetched(source: str, url: str, **options: Any) -> bytes:
    return asyncio.run(fetch(source, Settings(label_studio_url=url, **{"label_studio_token": "secret", **options})))


def test_pictures_come_from_the_label_studio_that_was_named() -> None:
    with serving("Token secret") as (url, _):
        for source in ("/data/upload/1/a.png", "data/upload/1/a.png", f"{url}/data/upload/1/a.png"):
            assert fetched(source, url) == picture()
        for source in (
            "/data/none.png",
            "/data/\0.png",
            "/data/" + "a" * 70_000,
            "http://[::1",
            "//[x]/a",
            f"{url}.example/a",
            "/nowhere",
        ):
            with pytest.raises(ImageError):
                fetched(source, url)
        with pytest.raises(ImageError, match="401"):
            fetched("/data/upload/1/a.png", url, label_studio_token="wrong")
        with pytest.raises(ImageTooLarge):
            fetched("/data/upload/1/a.png", url, max_image_bytes=100)
        for source in ("http://127.0.0.1:1/a.png", "//127.0.0.1:1/a.png", "file:///etc/passwd",
                       f"{url[:16]}.example{url[16:]}/a", f"{url}@127.0.0.1:1/a", f"{url[:-1]}\\@127.0.0.1:1/a",
                       f"https{url[4:]}/a", url.replace("//", "//a:b@") + "/data/upload/1/a.png"):  # fmt: skip
            with pytest.raises(SourceNotAllowed):
                fetched(source, url)
    with pytest.raises(ImageError, match="could not be fetched"):
        fetched("/data/upload/1/a.png", url)


def test_redirects_within_label_studio_are_followed_so_often() -> None:
    with serving("Token secret") as (url, handler):
        assert fetched(f"/hops/{MOST_REDIRECTS - 1}", url) == picture()
        assert {given for _, given, _ in handler.seen} == {"Token secret"}
        for source in (f"/hops/{MOST_REDIRECTS}", "/round"):
            handler.seen.clear()
            with pytest.raises(ImageError, match="redirects"):
                fetched(source, url)
            assert len(handler.seen) == MOST_REDIRECTS + 1


def test_a_store_that_was_named_gives_the_picture_and_never_sees_the_token() -> None:
    """As Label Studio sends to a presigned address of its cloud storage."""
    with serving("Token secret") as (url, handler), serving(None) as (store, kept):
        source = "/tasks/1/resolve/?fileuri=czM6Ly9idWNrZXQvYS5wbmc="
        handler.elsewhere = store + SIGNED
        with pytest.raises(SourceNotAllowed, match=f"HYPERSAM_LABEL_STUDIO_STORES only, and not from {store}$"):
            fetched(source, url)
        assert kept.seen == []
        for origin in ("http://127.0.0.1:1", "http://127.0.0.1", store.replace("http", "https")):
            with pytest.raises(SourceNotAllowed):
                fetched(source, url, label_studio_stores=(origin,))
            assert kept.seen == []
        assert fetched(source, url, label_studio_stores=("https://other.example", store)) == picture()
        assert fetched(store + SIGNED, url, label_studio_stores=(store,)) == picture()
        assert kept.seen == [(SIGNED, None, None)] * 2
        # From the store nothing leads on but to where it may go, and a name and password are not carried along.
        for elsewhere in ("http://169.254.169.254/latest", "file:///etc/passwd", "//127.0.0.1:1/a",
                          store.replace("//", "//a:b@") + SIGNED):  # fmt: skip
            handler.elsewhere = elsewhere
            with pytest.raises(SourceNotAllowed):
                fetched(source, url, label_studio_stores=(store,))
        handler.elsewhere = "http://[::1"
        with pytest.raises(ImageError):
            fetched(source, url, label_studio_stores=(store,))
        handler.elsewhere = store + SIGNED
        with pytest.raises(ImageTooLarge):
            fetched(source, url, label_studio_stores=(store,), max_image_bytes=100)


def test_stores_are_origins() -> None:
    for wrong in ("*", "s3://bucket", "https://store.example/bucket", "store.example"):
        with pytest.raises(ValueError, match="no origin"):
            Settings(label_studio_stores=(wrong,))


def test_a_picture_that_comes_drop_by_drop_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_SECONDS", 0.5)
    with serving("Token secret") as (url, _):
        began = time.monotonic()
        with pytest.raises(ImageError, match="within"):
            fetched("/drop", url)
        assert time.monotonic() - began < 3


def test_the_service_fetches_them(tmp_path: Path, checkpoint: Path) -> None:
    config = (
        '<View><Image name="i" value="$p"/><BrushLabels name="b" toName="i"><Label value="Car"/></BrushLabels></View>'
    )
    region = {
        "type": "keypointlabels", "to_name": "i", "original_width": 96, "original_height": 64,
        "value": {"x": 50, "y": 50, "keypointlabels": ["Car"]},
    }  # fmt: skip
    body = {
        "tasks": [{"data": {"p": "/tasks/1/resolve/?fileuri=czM6"}}], "label_config": config,
        "params": {"context": {"result": [region]}},
    }  # fmt: skip
    with serving("Token secret") as (url, handler), serving(None) as (store, kept):
        service = Api(Settings(
            data_dir=tmp_path / "data", port=0, workers=1, worker_heartbeat=2, device="cpu", register_default=False,
            label_studio_url=url, label_studio_token="secret", label_studio_stores=(store,),
        ))  # fmt: skip
        try:
            service.make_model(checkpoint, "tiny")
            handler.elsewhere = store + SIGNED
            answer = service.http.post("/label-studio/tiny/predict", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["results"][0]["result"][0]["value"]["brushlabels"] == ["Car"]
            assert kept.seen == [(SIGNED, None, None)]
            handler.elsewhere = "http://127.0.0.1:1/a.png"
            assert_problem(service.http.post("/label-studio/tiny/predict", json=body), 403, "source_not_allowed")
        finally:
            service.stop()
