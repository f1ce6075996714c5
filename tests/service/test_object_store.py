"""The store's contract over both backends, the object store with a real S3 server in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import obstore
import pytest

from hypersam.doctor import check_objects
from hypersam.errors import NameTaken, StoreUnavailable, UnknownModel, UnknownUpload
from hypersam.findings import Health
from hypersam.settings import Settings
from hypersam.store import ArtifactStore, ModelRecord, open_store
from hypersam.store import cache as cache_module
from hypersam.store.objects import BLOCK, ObjectStore

AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server(log: Path, host: str = "127.0.0.1") -> Iterator[int]:
    """A real S3 server in a process of its own; gives its port. Skips the test where there is none."""
    command = os.environ.get("MOTO_SERVER") or shutil.which("moto_server")
    if command is None:
        pytest.skip("no S3 server: `pip install moto[s3,server]` puts moto_server on PATH, or MOTO_SERVER names it")
    port = free_port()
    with (
        log.open("wb") as output,
        subprocess.Popen([command, "-H", host, "-p", str(port)], stdout=output, stderr=output) as server,
    ):
        try:
            for _ in range(300):
                assert server.poll() is None, log.read_text()
                try:
                    httpx.get(f"http://127.0.0.1:{port}")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield port
        finally:
            server.kill()


@pytest.fixture(scope="session")
def s3_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def bucket(s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    name = "b" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    httpx.put(f"{s3_address}/{name}").raise_for_status()
    return Settings(
        data_dir=tmp_path / "a", store_url=f"s3://{name}/some/prefix", store_endpoint=s3_address, store_allow_http=True
    )


def host(settings: Settings, name: str, **update: object) -> ObjectStore:
    store = open_store(settings.model_copy(update={"data_dir": settings.data_dir.with_name(name), **update}))
    assert isinstance(store, ObjectStore)
    return store


@pytest.fixture(params=["disk", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "disk":
        return open_store(Settings(data_dir=tmp_path))
    return open_store(request.getfixturevalue("bucket"))


def put(store: ArtifactStore, content: bytes) -> str:
    upload = store.new_upload(len(content))
    upload.write(content)
    digest = upload.finish()
    upload.stage()
    upload.commit()
    upload.discard()
    return digest


def register(store: ArtifactStore, name: str, content: bytes = b"artifact", request: str = "r") -> ModelRecord:
    with store.work_dir(f"job-{name}") as folder:
        path = folder / "model"
        path.write_bytes(content)
        return store.register(
            name, path, digest=hashlib.sha256(content).hexdigest(), request=request, source_sha256="s",
            report={"ratio": 2.0},
        )  # fmt: skip


def test_uploads(store: ArtifactStore) -> None:
    digest = put(store, b"hello")
    assert put(store, b"hello") == digest
    store.require_upload(digest)
    assert store.upload(digest).read_bytes() == b"hello"
    store.remove_upload(digest)
    for ask in (store.upload, store.require_upload):
        with pytest.raises(UnknownUpload):
            ask(digest)
    assert not list(store.root.rglob("*.part"))


def test_registrations(store: ArtifactStore) -> None:
    record = register(store, "v1.0_a-b")
    assert register(store, "v1.0_a-b") == record
    with pytest.raises(NameTaken):
        register(store, "v1.0_a-b", b"another", request="other")
    twin = register(store, "twin", request="other")
    assert [each.name for each in store.models()] == ["twin", "v1.0_a-b"]
    assert store.find("v1.0_a-b") == store.find("v1.0_a-b") == record
    store.remove("twin")
    assert store.artifact(record).read_bytes() == b"artifact"
    store.remove("v1.0_a-b")
    assert store.find("v1.0_a-b") is None
    with pytest.raises(UnknownModel):
        store.remove(twin.name)
    store.check()


def test_one_host_sees_what_another_makes(bucket: Settings) -> None:
    one, two = host(bucket, "one"), host(bucket, "two")
    content = os.urandom(BLOCK + 12345)  # more than one part
    assert two.upload(put(one, content)).read_bytes() == content
    record = register(two, "m", content)
    found = one.model("m")
    assert found == record
    assert one.artifact(found).read_bytes() == content
    two.remove("m")
    assert one.find("m") is None
    assert not list(one._listed("artifacts/"))


def test_of_two_hosts_that_want_a_name_one_wins(bucket: Settings) -> None:
    for trial in range(8):
        hosts, start, won, lost = [host(bucket, f"h{i}") for i in range(4)], threading.Barrier(4), [], []

        def race(
            number: int, hosts: list[ObjectStore] = hosts, start: threading.Barrier = start, won: list[int] = won,
            lost: list[int] = lost, name: str = f"m{trial}",
        ) -> None:  # fmt: skip
            start.wait()
            try:
                register(hosts[number], name, b"%d" % number, request=str(number))
                won.append(number)
            except NameTaken:
                lost.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert len(lost) == 3
        record = hosts[0].model(f"m{trial}")
        assert hosts[3].artifact(record).read_bytes() == b"%d" % won[0]
    assert len(list(hosts[0]._listed("artifacts/"))) == 8  # the losers' are gone


def test_many_readers_fetch_once(bucket: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    record = register(host(bucket, "one"), "m", os.urandom(1 << 20))
    two, fetched = host(bucket, "two"), []
    real = obstore.get_range

    def counted(*args: object, **named: object) -> object:
        fetched.append(args[1])
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "get_range", counted)
    threads = [threading.Thread(target=two.artifact, args=(record,)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [record.object]


def test_the_cache_is_bounded_and_spares_what_is_open(bucket: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "GRACE", 0.0)
    one, two = host(bucket, "one"), host(bucket, "two", cache_bytes=250)
    records = [register(one, f"m{i}", bytes([i]) * 100) for i in range(4)]
    with two.artifact(records[0]).open("rb"):
        for record in records[1:]:
            time.sleep(0.01)
            assert two.artifact(record).is_file()
    assert {path.stem for path in two.artifacts.iterdir()} == {records[0].digest, records[3].digest}


def test_what_was_changed_in_the_store_is_not_served(bucket: Settings) -> None:
    record = register(host(bucket, "one"), "m", b"right")
    two = host(bucket, "two")
    obstore.put(two.remote, record.object, b"wrong")
    with pytest.raises(StoreUnavailable, match="SHA-256"):
        two.artifact(record)
    assert not list(two.artifacts.iterdir())


def test_garbage_goes_and_what_is_wanted_stays(bucket: Settings) -> None:
    store = host(bucket, "one")
    wanted, unwanted = put(store, b"wanted"), put(store, b"unwanted")
    record = register(store, "m")
    obstore.put(store.remote, "artifacts/d/orphan.hsam", b"x")
    killed = store.artifacts / "fetch.part"
    killed.touch()
    store.sweep(3600, set())
    assert not killed.exists()  # nobody holds it
    assert store.size("artifacts/d/orphan.hsam") == 1  # young
    time.sleep(1.1)  # S3 tells times in seconds
    store.sweep(0, {wanted})
    assert store.size("artifacts/d/orphan.hsam") is None
    assert store.artifact(record).is_file()
    store.require_upload(wanted)
    with pytest.raises(UnknownUpload):
        store.require_upload(unwanted)


def test_a_store_that_cannot_be_reached(bucket: Settings) -> None:
    store = host(bucket, "one", store_endpoint=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreUnavailable):
        store.check()
    with pytest.raises(StoreUnavailable):
        store.find("m")
    store.sweep(0, set())  # is left for next time


def test_doctor_asks_the_object_store(bucket: Settings) -> None:
    (finding,) = check_objects(bucket)
    assert finding.health is Health.FINE
    away = bucket.model_copy(update={"store_endpoint": f"http://127.0.0.1:{free_port()}"})
    (finding,) = check_objects(away)
    assert finding.health is Health.BROKEN
    assert finding.todo is not None
    assert "HYPERSAM_STORE_ENDPOINT" in finding.todo
    assert check_objects(bucket.model_copy(update={"store_url": ""})) == []
    assert not bucket.data_dir.exists()
