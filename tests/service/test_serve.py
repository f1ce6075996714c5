"""``hypersam serve``: starts everything, keeps it running, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hypersam.cli import serve
from hypersam.embedded_redis import EmbeddedRedis
from hypersam.settings import Settings
from hypersam.store import ArtifactStore
from tests.service.running import Api

pytestmark = pytest.mark.slow


def family(pid: int) -> list[psutil.Process]:
    """Redis, the workers and their jobs; not the compiler that the self-check runs for a moment."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(("python", "redis-server")):
                found.append(process)
    return found


def gone(processes: list[psutil.Process], timeout: float = 15) -> bool:
    deadline = time.monotonic() + timeout
    alive = processes
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    return not alive


def start(tmp_path: Path, **options: object) -> Api:
    given = {
        "data_dir": tmp_path / "data",
        "port": 0,
        "workers": 2,
        "worker_heartbeat": 1,
        "device": "cpu",
        "register_default": False,
        **options,
    }
    return Api(Settings(**given))  # type: ignore[arg-type]


def wait_workers(service: Api, count: int) -> None:
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if service.http.get("/readyz").json()["workers"] == count:
            return
        time.sleep(0.1)
    raise AssertionError(service.output())


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_in_order(tmp_path: Path, sig: int) -> None:
    service = start(tmp_path)
    wait_workers(service, 2)
    children = family(service.process.pid)
    assert len(children) == 3  # Redis and two workers
    assert service.stop(sig) == 0, service.output()
    assert gone(children, 0.5)
    assert "Traceback" not in service.output(), service.output()
    with EmbeddedRedis(tmp_path / "data"):  # the data folder is free again
        pass


def test_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    service = start(tmp_path, workers=1)
    try:
        wait_workers(service, 1)
        worker = next(p for p in family(service.process.pid) if "workers" in p.cmdline())
        worker.kill()
        deadline = time.monotonic() + 30
        found: list[psutil.Process] = []
        while not found and time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = [p for p in family(service.process.pid) if "workers" in p.cmdline() and p.pid != worker.pid]
        assert found
        service.wait_for("starting another")
    finally:
        service.stop()


def test_nothing_outlives_a_killed_service(tmp_path: Path, checkpoint: Path) -> None:
    service = start(tmp_path)
    wait_workers(service, 2)
    job = service.compress(checkpoint, name="interrupted").json()
    while service.http.get(f"/jobs/{job['id']}").json()["attempt"] == 0:
        time.sleep(0.02)
    children = family(service.process.pid)
    assert len(children) >= 4  # the job's own process is one of them
    service.stop(signal.SIGKILL)
    assert gone(children)
    service = start(tmp_path)  # the queue is on disk: the job goes on
    try:
        done = service.wait_job(job["id"])
        assert (done["state"], done["attempt"]) == ("succeeded", 2)
    finally:
        service.stop()


def test_a_stop_in_the_middle_of_a_job(tmp_path: Path, checkpoint: Path) -> None:
    service = start(tmp_path, workers=1)
    job = service.compress(checkpoint, name="stopped").json()
    while service.http.get(f"/jobs/{job['id']}").json()["attempt"] == 0:
        time.sleep(0.02)
    children = family(service.process.pid)
    assert service.stop(signal.SIGINT) == 0
    assert gone(children, 0.5)
    service = start(tmp_path, workers=1)
    try:
        assert service.wait_job(job["id"])["state"] == "succeeded"
    finally:
        service.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.7", "no-such-host.invalid"])
def test_an_address_that_cannot_be_had(tmp_path: Path, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [
            sys.executable,
            "-m",
            "hypersam",
            "serve",
            "--host",
            host,
            "--port",
            port,
            "--data-dir",
            tmp_path / "data",
        ]
        process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    [line] = process.stderr.splitlines()
    assert "HYPERSAM_PORT" in line
    assert f"{host} port {port} cannot be had" in line
    assert process.stdout == ""
    assert not (tmp_path / "data" / "redis").exists()  # nothing was started


def test_the_carried_model_is_queued_once(
    tmp_path: Path, checkpoint: Path, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "CARRIED_SAM", checkpoint)
    settings = Settings(data_dir=tmp_path / "data", redis_url=redis_server.url)
    for _ in range(2):
        serve.register_carried(settings)
    connection = serve.connect(settings)
    (job,) = serve.JobBoard(connection, ArtifactStore(settings.data_dir), settings).list()
    connection.close()
    assert job.name == settings.default_model
    assert [p.name for p in (settings.data_dir / "uploads").iterdir()] == [job.source_sha256]


def test_no_carried_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CARRIED_SAM", tmp_path / "none.pth")
    serve.register_carried(Settings(data_dir=tmp_path))  # does not even ask for Redis


def test_an_application_that_fails_before_its_start_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before the application answers uvicorn's first event is no sign that it knows no such events."""

    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError("at once")

    def ready(url: str) -> None:
        raise AssertionError(f"is served at {url}")

    monkeypatch.setattr("service.app.create_app", lambda settings: broken)
    [bound] = serve._bound(Settings(port=0))
    with bound, pytest.raises(SystemExit) as ended:
        serve._run_api(Settings(port=0), [bound], ready)
    assert ended.value.code == 3  # uvicorn's for a start that failed
