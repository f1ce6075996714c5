from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import redis as redis_package

from hypersam.embedded_redis import EmbeddedRedis
from hypersam.settings import Settings
from service.readiness import KEPT, PATIENCE
from tests.service.running import Api, WorkerProcess, assert_problem, picture


def readiness(service: Api) -> dict[str, Any]:
    """The report of now, not the one that is kept."""
    time.sleep(KEPT + 0.05)
    found: dict[str, Any] = service.http.get("/readyz").json()
    return found


def worker_is_alive(settings: Settings) -> bool:
    """By the health check of the worker's container."""
    environment = {**os.environ, **settings.environment()}
    done = subprocess.run([sys.executable, "-m", "workers.alive"], env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert "alive on this host" in done.stdout, done.stderr
    return done.returncode == 0


def test_ready_and_metrics(api: Api, model: str) -> None:
    ready = api.http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ok", "ready": True, "can": {"segment": True, "compress": True}, "engine": "ok", "redis": "ok",
        "store": "ok", "workers": 1, "jobs_waiting": 0,
    }  # fmt: skip
    assert api.http.get("/readyz?need=compress").status_code == 200
    api.http.post("/segment", files={"image": picture()}, data={"model": model, "points": "[[1, 1]]"})
    text = api.http.get("/metrics").text
    assert 'hypersam_request_seconds_count{method="POST",route="/segment",status="200"}' in text
    assert f'hypersam_segment_stage_seconds_count{{model="{model}",stage="encode"}}' in text
    assert f'hypersam_batch_size_bucket{{le="1.0",model="{model}"}}' in text
    assert f'hypersam_embedding_lookups_total{{model="{model}",result="miss"}}' in text
    assert f'hypersam_decode_batch_size_bucket{{le="1.0",model="{model}"}}' in text
    assert f'hypersam_queue_length{{model="{model}",stage="encode"}} 0.0' in text
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines())
              if not name.startswith("#")}  # fmt: skip
    assert values[f'hypersam_resident_bytes{{model="{model}"}}'] > 0
    assert values[f'hypersam_embedding_bytes{{model="{model}"}}'] > 0
    assert values["hypersam_requests_inside"] == 0
    assert "hypersam_embedding_lookups_total" in text
    assert "hypersam_jobs_waiting 0.0" in text


def test_the_page_and_the_description(api: Api) -> None:
    page = api.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert 'href="docs"' in page.text
    paths = api.http.get("/openapi.json").json()["paths"]
    form = paths["/compress"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file"]
    assert {"file", "name", "variant", "codec", "options"} <= set(form["properties"])
    segment = paths["/segment"]["post"]["requestBody"]["content"]
    assert set(segment) == {"multipart/form-data", "application/json", "application/x-www-form-urlencoded"}
    assert api.http.get("/docs").status_code == 200


def test_the_distributed_form_tells_the_truth(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path / "elsewhere")
    redis.start()
    settings = Settings(
        data_dir=tmp_path / "data",
        redis_url=redis.url,
        port=0,
        workers=0,
        worker_heartbeat=1,
        device="cpu",
        register_default=False,
    )
    service = Api(settings)
    try:
        before = readiness(service)
        assert (before["status"], before["workers"]) == ("degraded", 0)
        assert before["can"] == {"segment": True, "compress": True}  # the job would wait for a worker
        worker = WorkerProcess(settings)
        assert readiness(service)["workers"] == 1
        assert worker_is_alive(settings)
        worker.stop()
        assert not worker_is_alive(settings)
        assert readiness(service)["workers"] == 0
        shutil.rmtree(settings.data_dir / "work")
        broken = readiness(service)
        assert broken["store"] == "cannot be written"
        assert broken["can"] == {"segment": True, "compress": False}
        assert service.http.get("/readyz").status_code == 200
        assert service.http.get("/readyz?need=compress").status_code == 503
        (settings.data_dir / "work").mkdir()
        assert readiness(service)["store"] == "ok"
        with redis_package.Redis.from_url(redis.url) as client:
            client.config_set("maxmemory", 1)
            assert readiness(service)["redis"] == "takes no writes"
            client.config_set("maxmemory", 0)
        redis.stop()
        began = time.monotonic()
        down = readiness(service)
        assert down["redis"] == "does not answer"
        assert down["workers"] is None
        assert down["can"] == {"segment": True, "compress": False}
        assert time.monotonic() - began < 2 * PATIENCE
        shutil.rmtree(settings.data_dir / "models")
        assert readiness(service)["status"] == "not ready"
        assert service.http.get("/readyz").status_code == 503
        (settings.data_dir / "models").mkdir()
        assert_problem(service.http.get("/jobs"), 503, "unavailable")
        assert service.http.get("/healthz").status_code == 200
        assert service.http.get("/models").status_code == 200
        assert "hypersam_workers NaN" in service.http.get("/metrics").text
    finally:
        service.stop()
        redis.stop()


def test_a_redis_that_refuses_is_no_fault_of_ours(
    tmp_path: Path, checkpoint: Path, redis_server: EmbeddedRedis
) -> None:
    """Its memory is full, and so it takes no writes; reads it answers."""
    settings = Settings(
        data_dir=tmp_path / "store", redis_url=redis_server.url, port=0, workers=0, device="cpu",
        register_default=False,
    )  # fmt: skip
    service = Api(settings)
    try:
        with redis_package.Redis.from_url(redis_server.url) as client:
            client.config_set("maxmemory", 1)
        refused = service.compress(checkpoint, name="m")
        assert "refuses" in assert_problem(refused, 503, "unavailable")["detail"]
        assert refused.headers["retry-after"]
        assert service.http.get("/jobs").status_code == 200
        assert not list((settings.data_dir / "uploads").iterdir())
    finally:
        service.stop()
