from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from hypersam.errors import InvalidName, NameTaken, StoreFull, UnknownModel, UnknownUpload, UploadTooLarge
from hypersam.settings import Settings
from hypersam.store import ArtifactStore


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def register(store: ArtifactStore, name: str, request: str = "r", digest: str = "d") -> None:
    with store.work_dir("job") as folder:
        path = folder / "model"
        path.write_bytes(b"artifact")
        store.register(name, path, digest=digest, request=request, source_sha256="s", report={"ratio": 2.0})


def test_an_upload_is_named_by_its_content(store: ArtifactStore) -> None:
    upload = store.new_upload(100)
    upload.write(b"hel")
    upload.write(b"lo")
    digest = upload.finish()
    with pytest.raises(UnknownUpload):
        store.upload(digest)
    upload.commit()
    upload.discard()
    assert store.upload(digest).read_bytes() == b"hello"
    store.remove_upload(digest)
    with pytest.raises(UnknownUpload):
        store.upload(digest)


def test_uploads_that_fail_leave_nothing(store: ArtifactStore) -> None:
    upload = store.new_upload(4)
    with pytest.raises(UploadTooLarge):
        upload.write(b"hello")
    upload.discard()
    assert not list(store.uploads.iterdir())


def test_no_room(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = store.new_upload(1 << 30)

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    upload._file.close()
    monkeypatch.setattr(upload, "_file", Full())
    with pytest.raises(StoreFull):
        upload.write(b"x")
    upload.discard()


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", ".hidden", "-x", "a" * 129, "a\n", "ä"])
def test_bad_names(store: ArtifactStore, name: str) -> None:
    with pytest.raises((InvalidName, FileNotFoundError)):
        store.register(name, store.root / "none", digest="d", request="r", source_sha256="s", report={})
    assert store.find(name) is None
    with pytest.raises(UnknownUpload):
        store.upload(name)


def test_registrations(store: ArtifactStore) -> None:
    register(store, "v1.0_a-b")
    register(store, "v1.0_a-b")  # the same request again
    with pytest.raises(NameTaken):
        register(store, "v1.0_a-b", request="other")
    register(store, "twin", request="other")
    assert [record.name for record in store.models()] == ["twin", "v1.0_a-b"]
    record = store.remove("twin")
    assert store.artifact(record).is_file()  # the other name still stands for it
    store.remove("v1.0_a-b")
    assert not store.artifact(record).exists()
    with pytest.raises(UnknownModel):
        store.remove("twin")
    assert not list(store.root.rglob("*.part"))


LEAVE_HALF_MADE = """
import os, signal, sys
from pathlib import Path
from hypersam.store import ArtifactStore
store = ArtifactStore(Path(sys.argv[1]))
upload = store.new_upload(100)
upload.write(b"half")
upload.flush()
with store.work_dir("killed") as folder:
    (folder / ".model.hsam.part").write_bytes(b"half")
    with store._exclusive():
        (store.registrations / ".half.part").write_bytes(b"{")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sweeping_takes_what_a_killed_process_left_and_nothing_that_is_being_made(store: ArtifactStore) -> None:
    """At once, whatever its age: what is half made is told by the lock that its maker holds."""
    subprocess.run([sys.executable, "-c", LEAVE_HALF_MADE, str(store.root)], check=False)
    assert len(list(store.root.rglob("*.part"))) == 3
    upload = store.new_upload(100)
    upload.write(b"hello")
    with store.work_dir("job") as folder, store.work_dir("job") as again:
        assert folder != again  # a try that was taken for lost keeps its folder while it runs
        long_ago = time.time() - 1000
        for path in (upload.path, folder):
            os.utime(path, (long_ago, long_ago))
        store.sweep(2000)
        assert list(store.uploads.iterdir()) == [upload.path]
        assert {path.name for path in store.work.iterdir()} == {folder.name, again.name}
        assert not list(store.registrations.iterdir())
        upload.finish()
        store.sweep(500)
        assert upload.commit().read_bytes() == b"hello"
    assert not list(store.work.iterdir())


def test_sweeping_takes_an_artifact_that_no_name_stands_for(store: ArtifactStore) -> None:
    """A worker was killed between the two steps of a registration, and no other try came."""
    register(store, "kept", digest="kept")
    for name, age in (("lost", 1000), ("young", 0), ("kept", 1000)):
        path = store.artifacts / f"{name}.hsam"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    store.sweep(500)
    assert sorted(path.stem for path in store.artifacts.iterdir()) == ["kept", "young"]


def committed(store: ArtifactStore, content: bytes, age: float) -> str:
    upload = store.new_upload(100)
    upload.write(content)
    upload.finish()
    path = upload.commit()
    moment = time.time() - age
    os.utime(path, (moment, moment))
    return upload.digest


def test_sweeping_spares_uploads_that_are_wanted(store: ArtifactStore) -> None:
    wanted, unwanted, touched = (committed(store, content, 1000) for content in (b"a", b"b", b"c"))
    store.touch_upload(touched)
    store.touch_upload("0" * 64)  # not there: nothing happens, and nothing appears
    store.sweep(500)
    assert {path.name for path in store.uploads.iterdir()} == {wanted, unwanted, touched}
    store.sweep(500, keep={wanted})
    assert {path.name for path in store.uploads.iterdir()} == {wanted, touched}


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    assert Settings(device=device).device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:0\n", "xcpu", "mps"])
def test_no_devices(device: str) -> None:
    with pytest.raises(ValidationError):
        Settings(device=device)


def test_settings_reach_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path, redis_url="unix:///a%20b", workers=3, keep_uploads=True, device="cuda:1",
    )  # fmt: skip
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
