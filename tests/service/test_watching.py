"""Whoever watches a job sees it through an outage of Redis, and is sent away whole when the service stops."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hypersam.embedded_redis import EmbeddedRedis
from hypersam.settings import Settings
from tests.service.running import Api


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        server.keep()
        yield server


class Watcher:
    """Reads the events of a job on a thread."""

    def __init__(self, service: Api, job: str) -> None:
        self.states: list[str] = []
        self.error: Exception | None = None
        self._url = f"{service.url}/jobs/{job}/events"
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        while not self.states:
            time.sleep(0.01)
            assert self.thread.is_alive()

    def _read(self) -> None:
        try:
            with httpx.stream("GET", self._url, timeout=60) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data: "):
                        self.states.append(json.loads(line[6:])["state"])
        except Exception as error:
            self.error = error


def test_redis_dies_and_the_service_stops(tmp_path: Path, checkpoint: Path, redis: EmbeddedRedis) -> None:
    service = Api(Settings(data_dir=tmp_path / "data", port=0, workers=0, device="cpu", register_default=False,
                           redis_url=redis.url))  # fmt: skip
    try:
        jobs = [service.compress(checkpoint.read_bytes(), name=name).json()["id"] for name in ("first", "second")]
        through, whole = (Watcher(service, job) for job in jobs)
        os.kill(redis.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while service.http.get("/jobs").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert service.http.delete(f"/jobs/{jobs[0]}").status_code == 200
        through.thread.join(30)
        assert (through.states[0], through.states[-1], through.error) == ("queued", "cancelled", None)
        assert whole.thread.is_alive()
        assert service.stop(signal.SIGTERM, timeout=30) == 0
        whole.thread.join(30)
        assert (whole.states, whole.error) == (["queued"], None)
    finally:
        service.stop(signal.SIGKILL)
    for word in ("Traceback", "without completing"):
        assert word not in service.output()
