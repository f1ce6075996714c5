"""An error that nobody foresaw leaves as a problem document with the request's id, which the log has too."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from hypersam import logs
from hypersam.settings import Settings
from service.app import create_app
from tests.models import save_checkpoint
from tests.service.running import Api, assert_problem, picture


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    made = create_app(Settings(data_dir=tmp_path, device="cpu"))

    async def fail() -> None:
        raise ZeroDivisionError("nobody foresaw this")

    async def fail_late() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"begun"
            raise ZeroDivisionError("nor this")

        return StreamingResponse(parts())

    made.add_api_route("/fail", fail)
    made.add_api_route("/fail-late", fail_late)
    return made


@pytest.fixture(params=["json", "text"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the log of a process that is set up by ``logs.configure`` holds."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    monkeypatch.setattr("sys.stderr", stream)
    logs.configure(Settings(data_dir=tmp_path, log_format=request.param))
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def ask(app: FastAPI, path: str) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path, headers={"X-Request-ID": "five-hundred"})

    return asyncio.run(once())


def test_it_has_the_id_in_the_answer_and_in_the_log(app: FastAPI, written: io.StringIO) -> None:
    response = ask(app, "/fail")
    body = assert_problem(response, 500, "internal_error")
    assert "nobody" not in json.dumps(body)
    assert response.headers["x-request-id"] == "five-hundred"
    lines = written.getvalue()
    assert "nobody foresaw this" in lines  # the traceback is the log's
    if lines.startswith("{"):
        told = [line for line in map(json.loads, lines.splitlines()) if line["logger"] != "httpx"]
        assert {line["request_id"] for line in told} == {"five-hundred"}
        [access] = [line for line in told if "status" in line]
        assert access["status"] == 500
        [failed] = [line for line in told if "exception" in line]
        assert failed["level"] == "error"
    else:
        assert "GET /fail failed [five-hundred]\n" in lines
        assert any(line.endswith("ms [five-hundred]") and " GET /fail 500 " in line for line in lines.splitlines())


def test_an_answer_that_has_begun_breaks_off(app: FastAPI, written: io.StringIO) -> None:
    assert ask(app, "/fail-late").status_code == 200
    assert "nor this" in written.getvalue()


def test_who_is_still_served_when_the_time_is_up_is_told_so(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", port=0, workers=1, device="cpu", register_default=False,
                        drain_seconds=1)  # fmt: skip
    service = Api(settings)
    try:
        service.make_model(save_checkpoint(tmp_path / "tiny.pth"), "tiny")
        answers: list[httpx.Response] = []

        def ask() -> None:
            form = {"model": "tiny", "points_per_side": "64", "pred_iou_thresh": "-9", "stability_score_thresh": "-1"}
            with httpx.Client(base_url=service.url, timeout=60) as client:
                answers.append(
                    client.post("/segment/everything", files={"image": picture(1500, 1500)}, data=form)
                )  # fmt: skip

        thread = threading.Thread(target=ask)
        thread.start()
        while 'hypersam_embedding_lookups_total{model="tiny"' not in service.http.get("/metrics").text:
            time.sleep(0.01)
        assert service.stop(signal.SIGTERM, timeout=60) == 0, service.output()
        thread.join()
    finally:
        service.stop(signal.SIGKILL)
    body = assert_problem(answers[0], 503, "unavailable")
    assert "stopped" in body["detail"]
    assert int(answers[0].headers["retry-after"]) >= 1
    assert "Traceback" not in service.output()
