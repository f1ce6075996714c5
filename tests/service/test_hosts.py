"""Two hosts, each with its own network, disk, API and worker, that share a Redis and an object store alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hypersam.embedded_redis import find_redis_server
from hypersam.settings import Settings
from hypersam.store import open_store
from hypersam.store.objects import ObjectStore
from tests.models import official_sam
from tests.service.running import JOB_TIMEOUT, Api, picture
from tests.service.test_object_store import AWS, free_port, s3_server

pytestmark = pytest.mark.slow
SHARED, HOSTS = "10.79.{}.1", "10.79.{}.2"


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces that reach this one, each over a wire of its own, and not one another."""
    names = tuple(f"hsam{os.getpid() % 100000}-{n}" for n in (1, 2))
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for number, name in enumerate(names, 1):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode()[:200]}")
            wire = f"hsam{os.getpid() % 10000}{number}"
            ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("addr", "add", SHARED.format(number) + "/30", "dev", wire)
            ip("link", "set", wire, "up")
            ip("-n", name, "addr", "add", HOSTS.format(number) + "/30", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names[0], names[1]
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


@pytest.fixture
def redis_port(tmp_path: Path, networks: tuple[str, str]) -> Iterator[int]:
    port = free_port()
    bound = ("127.0.0.1", *(SHARED.format(number) for number in (1, 2)))
    command = [str(find_redis_server()), "--port", str(port), "--bind", *bound, "--protected-mode", "no",
               "--dir", str(tmp_path), "--appendonly", "yes", "--save", ""]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            yield port
        finally:
            server.kill()


@pytest.fixture
def make_host(
    tmp_path: Path, networks: tuple[str, str], redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Api]]:
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    with s3_server(tmp_path / "s3.log", "0.0.0.0") as s3_port, contextlib.ExitStack() as hosts:
        httpx.put(f"http://127.0.0.1:{s3_port}/shared").raise_for_status()

        def make(number: int) -> Api:
            hub = SHARED.format(number)
            settings = Settings(
                data_dir=tmp_path / f"host{number}", host=HOSTS.format(number), port=0, workers=1, worker_heartbeat=2,
                redis_url=f"redis://{hub}:{redis_port}/0", store_url="s3://shared/models", store_allow_http=True,
                store_endpoint=f"http://{hub}:{s3_port}", device="cpu", register_default=False,
            )  # fmt: skip
            host = Api(settings, within=("ip", "netns", "exec", networks[number - 1]))
            hosts.callback(host.stop)
            return host

        yield make


def segment(host: Api, model: str) -> dict[str, Any]:
    answer = host.http.post(
        "/segment", files={"image": ("a.png", picture())}, data={"model": model, "points": "[[30,20]]", "labels": "[1]"}
    )
    assert answer.status_code == 200, (answer.text, host.output())
    found: dict[str, Any] = answer.json()
    return found


def test_a_host_dies_and_the_other_goes_on(tmp_path: Path, make_host: Callable[[int], Api]) -> None:
    source = tmp_path / "a.pth"
    torch.save(official_sam().state_dict(), source)
    one, two = make_host(1), make_host(2)
    one.make_model(source, "first")
    assert segment(two, "first")["masks"] == segment(one, "first")["masks"]
    # A client that got its answer from one host finds its job at the other.
    jobs = [
        one.compress(source, name=f"m{n}", codec="lattice", target_ratio="5", policy="sensitivity").json()["id"]
        for n in range(4)
    ]
    deadline = time.monotonic() + JOB_TIMEOUT
    while sum(two.http.get(f"/jobs/{job}").json()["state"] == "running" for job in jobs) < 2:
        assert time.monotonic() < deadline, two.output()
        time.sleep(0.02)
    one.process.send_signal(signal.SIGKILL)  # in the middle of one of them
    one.process.wait()
    for number, job in enumerate(jobs):
        ended = two.wait_job(job)
        assert ended["state"] == "succeeded", (ended, two.output())
        assert segment(two, f"m{number}")["masks"]
    store = open_store(two.settings.model_copy(update={
        "store_endpoint": str(two.settings.store_endpoint).replace(SHARED.format(2), "127.0.0.1"),
    }))  # fmt: skip
    assert isinstance(store, ObjectStore)
    held = {str(each["path"]) for each in store._listed("artifacts/")}
    assert held == {record.object for record in store.models()}  # nothing half made, nothing lost
    assert len(held) == 5
    assert not list(two.settings.data_dir.glob("work/*"))
    # The host that comes back, its disk as it was left, serves what was made meanwhile.
    again = make_host(1)
    assert segment(again, "m3")["masks"] == segment(two, "m3")["masks"]
