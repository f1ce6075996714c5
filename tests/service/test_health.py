from __future__ import annotations

import shutil
from pathlib import Path

import redis as redis_package

from hypersam.embedded_redis import EmbeddedRedis
from hypersam.settings import Settings
from tests.service.running import Api, WorkerProcess, assert_problem, picture


def test_ready_and_metrics(api: Api, model: str) -> None:
    ready = api.http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"redis": "ok", "store": "ok", "workers": 1, "jobs_waiting": 0, "ready": True}
    api.http.post("/segment", files={"image": picture()}, data={"model": model, "points": "[[1, 1]]"})
    text = api.http.get("/metrics").text
    assert 'hypersam_request_seconds_count{method="POST",route="/segment",status="200"}' in text
    assert f'hypersam_segment_stage_seconds_count{{model="{model}",stage="encode"}}' in text
    assert f'hypersam_batch_size_bucket{{le="1.0",model="{model}"}}' in text
    assert f'hypersam_embedding_lookups_total{{model="{model}",result="miss"}}' in text
    assert 'hypersam_queue_length{stage="encode"} 0.0' in text
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
    assert set(segment) == {"multipart/form-data", "application/json"}
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
        assert service.http.get("/readyz").json()["workers"] == 0
        worker = WorkerProcess(settings)
        assert service.http.get("/readyz").json()["workers"] == 1
        worker.stop()
        assert service.http.get("/readyz").json()["workers"] == 0
        shutil.rmtree(settings.data_dir / "work")
        broken = service.http.get("/readyz")
        assert broken.status_code == 503
        assert broken.json()["store"] == "cannot be written"
        redis.stop()
        down = service.http.get("/readyz")
        assert down.status_code == 503
        assert down.json()["redis"] == "does not answer"
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
