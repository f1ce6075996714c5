"""Downloads from a real HTTP server that can break off, forget ranges, or change its file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypersam.errors import FetchError, WrongHash
from hypersam.fetch import fetch
from hypersam.sam.registry import VARIANTS
from tests.models import save_checkpoint

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Gives ``content``; ``cuts`` are the bytes after which answers break off, one an answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.ranges, self.length, self.etag = CONTENT, list[int](), True, True, '"1"'
        self.asked: list[tuple[str | None, int]] = []
        self.busy: list[tuple[int, str | None]] = []  # answers before the file: the status, and Retry-After

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/model.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        assert self.headers["Accept-Encoding"] == "identity"
        if self.path != "/model.pt":
            self.answer(302 if self.path == "/moved" else 404, asked)
            return
        if server.busy:
            status, pause = server.busy.pop(0)
            self.answer(status, asked, pause)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if self.headers.get("If-Range") not in (None, server.etag):
            start = 0
        if start >= len(server.content):
            self.answer(416, asked)
            return
        self.send_response(206 if start else 200)
        server.asked.append((asked, 206 if start else 200))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        body = server.content[start:]
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def answer(self, status: int, asked: str | None, pause: str | None = None) -> None:
        self.server.asked.append((asked, status))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/model.pt")
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(self.server.content)}")
        if pause is not None:
            self.send_header("Retry-After", pause)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_only_then_has_its_name(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    def progress(done: int, of: int | None) -> None:
        assert "a.pt" not in names(tmp_path)
        seen.append((done, of))

    found = fetch(server.url.replace("model.pt", "moved"), tmp_path / "a.pt", sha256=SHA256, progress=progress)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    assert (found.sha256, found.bytes, found.received, found.verified) == (SHA256, len(CONTENT), len(CONTENT), True)
    assert names(tmp_path) == ["a.pt"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)

    server.asked.clear()
    again = fetch(server.url, tmp_path / "a.pt", sha256=SHA256)
    assert (again.received, again.verified, server.asked) == (0, True, [])
    with pytest.raises(WrongHash, match="there already"):
        fetch(server.url, tmp_path / "a.pt", sha256="0" * 64)
    with pytest.raises(FetchError, match="there already, and no hash"):
        fetch(server.url, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("pinned", [SHA256, None])
def test_a_cut_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path, pinned: str | None) -> None:
    server.cuts = [300_000, 0, 200_000]
    found = fetch(server.url, tmp_path / "a.pt", sha256=pinned, patience=0.01)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    assert server.asked == [(None, 200), ("bytes=300000-", 206), ("bytes=300000-", 206), ("bytes=500000-", 206)]
    assert (found.received, found.sha256, found.verified) == (len(CONTENT), SHA256, pinned is not None)


def test_a_later_call_goes_on_from_the_part(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, *[0] * 4]
    with pytest.raises(FetchError, match="100000 bytes are kept"):
        fetch(server.url, tmp_path / "a.pt", patience=0.001)
    assert names(tmp_path) == ["a.pt.part", "a.pt.part.json"]
    server.asked.clear()
    found = fetch(server.url, tmp_path / "a.pt")
    assert server.asked == [("bytes=100000-", 206)]
    assert found.received == len(CONTENT) - 100_000
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.pt"]


def test_two_versions_are_never_joined(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, *[0] * 4]
    with pytest.raises(FetchError):
        fetch(server.url, tmp_path / "a.pt", patience=0.001)
    server.content, server.etag = CONTENT[::-1], '"2"'
    fetch(server.url, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == CONTENT[::-1]


def test_a_part_of_unknown_version_is_not_built_upon(server: Server, tmp_path: Path) -> None:
    server.etag = ""
    (tmp_path / "a.pt.part").write_bytes(b"of something else")
    fetch(server.url, tmp_path / "a.pt")
    assert server.asked == [(None, 200)]
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew_but_not_for_ever(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [300_000]
    fetch(server.url, tmp_path / "a.pt", sha256=SHA256, patience=0.001)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    server.cuts, server.asked = [1000] * 50, []
    with pytest.raises(FetchError, match="cannot be had"):
        fetch(server.url, tmp_path / "b.pt", sha256=SHA256, patience=0.001)
    assert len(server.asked) < 10


def test_a_complete_part_needs_no_more_than_a_question(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.pt.part").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "a.pt", sha256=SHA256).received == 0
    (tmp_path / "b.pt.part").write_bytes(CONTENT + b"more")
    assert fetch(server.url, tmp_path / "b.pt", sha256=SHA256, patience=0.001).received == len(CONTENT)
    assert (tmp_path / "b.pt").read_bytes() == CONTENT


def test_a_server_that_does_not_tell_the_size(server: Server, tmp_path: Path) -> None:
    server.length = False
    sizes: set[int | None] = set()
    fetch(server.url, tmp_path / "a.pt", sha256=SHA256, progress=lambda _, of: sizes.add(of))
    assert sizes == {None}
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


def test_without_size_and_hash_what_is_cut_off_is_no_file(server: Server, tmp_path: Path) -> None:
    server.content = save_checkpoint(tmp_path / "whole.pth").read_bytes()
    server.length, server.cuts = False, [100_000, 0, 50_000]
    found = fetch(server.url, tmp_path / "a.pt", patience=0.001)
    assert (tmp_path / "a.pt").read_bytes() == server.content
    assert (found.verified, found.checked) == (False, "size")  # the answer to a question for the rest tells it
    assert [answered for _, answered in server.asked] == [200, 206, 206, 206]

    server.cuts, server.etag = [100_000] * 9, ""
    with pytest.raises(FetchError, match=r"told no size, .* b\.pt is a truncated"):
        fetch(server.url, tmp_path / "b.pt", patience=0.001)
    assert not (tmp_path / "b.pt").exists()


def test_safetensors_and_files_that_are_whole_but_of_no_use_are_told_from_cut_ones(
    server: Server, tmp_path: Path
) -> None:
    server.length, server.etag = False, ""
    save_file({"w": torch.arange(50_000.0)}, tmp_path / "whole.safetensors")
    torch.save([torch.ones(9), print], tmp_path / "unsafe.pt")
    for name in ("whole.safetensors", "unsafe.pt"):
        server.content, server.cuts = (tmp_path / name).read_bytes(), [1000]
        assert fetch(server.url, tmp_path / f"b.{name}", patience=0.001).checked == "content"
        assert (tmp_path / f"b.{name}").read_bytes() == server.content


def test_how_a_file_is_known_to_be_whole_is_told(server: Server, tmp_path: Path) -> None:
    assert fetch(server.url, tmp_path / "a.pt").checked == "size"
    assert fetch(server.url, tmp_path / "b.pt", sha256=SHA256).checked == "sha256"
    assert fetch(server.url, tmp_path / "b.pt", sha256=SHA256).checked == "sha256"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.busy = [(status, None)] * 4
    fetch(server.url, tmp_path / "a.pt", patience=0.001)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    server.asked, server.busy = [], [(status, None)] * 9
    with pytest.raises(FetchError, match=f"it answers {status} "):
        fetch(server.url, tmp_path / "b.pt", patience=0.001)
    assert [answered for _, answered in server.asked] == [status] * 5
    assert names(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(
    ("pause", "least", "most"),
    [("1", 1.0, 5.0), ("date", 1.0, 5.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.9), ("soon", 0.0, 0.9)],
)
def test_it_is_waited_for_as_long_as_it_asks(
    server: Server, tmp_path: Path, pause: str, least: float, most: float
) -> None:
    in_a_moment = format_datetime(datetime.now(UTC) + timedelta(seconds=2.5), usegmt=True)  # to whole seconds, cut off
    server.busy = [(503, in_a_moment if pause == "date" else pause)]
    began = time.monotonic()
    fetch(server.url, tmp_path / "a.pt", patience=0.001)
    assert least <= time.monotonic() - began < most


def test_nobody_waits_for_hours_and_what_came_stays(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, *[0] * 4]
    with pytest.raises(FetchError):
        fetch(server.url, tmp_path / "a.pt", patience=0.001)
    server.busy, server.asked = [(429, "7200")], []
    with pytest.raises(FetchError, match=r"429 .* left alone for 7200 s; 100000 bytes are kept"):
        fetch(server.url, tmp_path / "a.pt", patience=0.001)
    assert len(server.asked) == 1
    fetch(server.url, tmp_path / "a.pt")
    assert server.asked[1:] == [("bytes=100000-", 206)]


def test_a_wrong_hash_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WrongHash, match=SHA256):
        fetch(server.url, tmp_path / "a.pt", sha256="0" * 64)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [("{}x", "404 Not Found"), ("http://127.0.0.1:9/x", "cannot be had"), ("ftp://a/b", "no http or https address"),
     ("no address", "no http or https address")],
)  # fmt: skip
def test_errors_say_what_was_wrong_and_leave_nothing(server: Server, tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(url.format(server.url), tmp_path / "a.pt", patience=0.001)
    assert names(tmp_path) == []


def test_two_processes_do_not_write_one_part(server: Server, tmp_path: Path) -> None:
    def again(*_: object) -> None:
        with pytest.raises(FetchError, match="another process"):
            fetch(server.url, tmp_path / "a.pt")

    fetch(server.url, tmp_path / "a.pt", progress=again)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


def run(*arguments: str | Path, code: int = 0) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "hypersam.cli", "fetch", *map(str, arguments), "--json"], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_the_command_knows_names_and_hashes(server: Server, tmp_path: Path) -> None:
    found = run("sam2.1_hiera_small", "--out", tmp_path, "--url", server.url)
    assert found["path"] == str(tmp_path / "sam2.1_hiera_small.pt")
    assert (found["sha256"], found["verified"], found["variant"]) == (SHA256, False, "sam2.1_hiera_small")
    for arguments, error in (
        (["sam_vit_b", "--out", tmp_path / "b.pth", "--url", server.url], "wrong_hash"),
        (["sam_vit_z"], "invalid_option"),
        (["sam2.1_hiera_small", "--out", tmp_path / "none" / "x.pt", "--url", server.url], "file"),
    ):
        answer = run(*arguments, code=1)["error"]
        assert isinstance(answer, dict)
        assert answer["code"] == error
    assert names(tmp_path) == ["sam2.1_hiera_small.pt"]


def test_the_command_says_what_was_not_compared(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hypersam.cli", "fetch", "tiny_sam", "--url", server.url, "--out", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "could not be compared, for no published hash of this file is known; the size is what" in said


def test_where_no_address_is_known_the_project_is_named() -> None:
    for row in VARIANTS:
        assert (row.url is None) == (row.page is not None)
        assert row.sha256 is None or len(row.sha256) == 64
    for variant, words in (("mobile_sam_v2", "--decoder FILE"), ("efficient_sam_s", "archive")):
        error = run(variant, code=1)["error"]
        assert isinstance(error, dict)
        page = next(row.page for row in VARIANTS if row.id == variant)
        assert page is not None
        for each in (page, f"hypersam compress FILE OUT.hsam --variant {variant}", words):
            assert each in error["message"]
