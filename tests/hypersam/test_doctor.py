"""The doctor, on parts that work and on parts that are really broken."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hypersam import doctor, doctor_host
from hypersam.embedded_redis import EmbeddedRedis
from hypersam.errors import InvalidOption
from hypersam.findings import Finding, Health
from hypersam.jobs import connect
from hypersam.keys import new_key
from hypersam.logs import JsonFormatter
from hypersam.settings import Settings


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at ``folder``; the test is left out where none can be mounted."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting needs privileges: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def healths(findings: list[Finding]) -> dict[str, Health]:
    return {finding.part: finding.health for finding in findings}


def run(*arguments: str, under: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYPERSAM_")}
    command = [*under, sys.executable, "-m", "hypersam.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, timeout=120)


def test_all_is_well(tmp_path: Path, redis: EmbeddedRedis) -> None:
    small = {"HYPERSAM_MAX_UPLOAD_BYTES": "9", "HYPERSAM_RESIDENT_BYTES": "9", "HYPERSAM_EMBEDDING_CACHE_BYTES": "0"}
    done = run("--json", "--data-dir", str(tmp_path / "data"), "--redis-url", redis.url, "--device", "cpu", **small)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    parts = {row["part"]: row for row in found["findings"]}
    assert set(parts) == {"versions", "redis", "workers", "store", "disk", "memory", "device", "kernel", "compiler",
                          "keys", "kernel cache"}  # fmt: skip
    assert [name for name, row in parts.items() if row["health"] != "fine"] == ["workers"]  # none runs here
    assert found["health"] == "warning"
    assert all((row["todo"] is None) == (row["health"] == "fine") for row in parts.values())
    assert parts["redis"]["facts"]["append_only"] is True
    assert parts["kernel"]["facts"]["run"] is False
    assert "not run" in parts["kernel"]["says"]
    assert not (tmp_path / "data").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["redis"]


def test_what_is_broken_is_told_in_words_with_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the data folder's place")
    done = run("--data-dir", str(tmp_path / "file"), "--redis-url", "redis://127.0.0.1:1/0", "--device", "cuda:31",
               PATH="", CC="", HYPERSAM_STORE_URL="s3://bucket/prefix", HYPERSAM_STORE_ENDPOINT="http://127.0.0.1:1",
               HYPERSAM_STORE_REGION="us-east-1", HYPERSAM_STORE_ALLOW_HTTP="true",
               AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="hunter2")  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("broken   object store") for line in lines)
    assert "hunter2" not in done.stdout + done.stderr
    for part in ("redis", "store", "device"):
        at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["broken", part])
        assert lines[at + 1].strip().startswith("→ ")
    assert any("no C compiler is found" in line for line in lines)


def test_redis_that_is_stopped_full_or_forgetful(redis: EmbeddedRedis) -> None:
    import redis as client

    settings = Settings(redis_url=redis.url)
    assert healths(doctor.check_redis(settings)) == {"redis": Health.FINE, "workers": Health.WARNING}
    with client.Redis.from_url(redis.url) as connection:
        connection.config_set("appendonly", "no")
        [first, _] = doctor.check_redis(settings)
        assert first.health is Health.WARNING
        assert "append-only" in first.says
        connection.config_set("appendonly", "yes")
        connection.config_set("maxmemory-policy", "allkeys-lru")
        connection.config_set("maxmemory", 1 << 30)
        assert "noeviction" in (doctor.check_redis(settings)[0].todo or "")
        connection.config_set("maxmemory-policy", "noeviction")
        connection.config_set("maxmemory", 1)
        [full] = doctor.check_redis(settings)
        assert full.health is Health.BROKEN
        assert "memory" in full.says
    redis.stop()
    [stopped] = doctor.check_redis(settings)
    assert stopped.health is Health.BROKEN


def test_a_redis_url_that_is_none() -> None:
    for url in ("http://somewhere", "redis://:hunter2/secret@somewhere:6379/0", "redis://:hunter2#x@somewhere"):
        [found] = doctor.check_redis(Settings(redis_url=url))
        assert found.health is Health.BROKEN
        assert "redis://" in (found.todo or "")
        assert "%2F" in found.says
        assert "hunter2" not in str(found)  # what was taken for a port is the beginning of a password
        with pytest.raises(InvalidOption) as caught:
            connect(Settings(redis_url=url))
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_no_redis_named_and_one_of_ours_running(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    [idle] = doctor.check_redis(settings)
    assert "hypersam serve" in idle.says
    with EmbeddedRedis(tmp_path):
        assert healths(doctor.check_redis(settings)) == {"redis": Health.FINE, "workers": Health.WARNING}


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=256k") as folder:
        settings = Settings(data_dir=folder)
        assert doctor.check_store(settings).health is Health.FINE
        (folder / "rest").write_bytes(bytes(224 << 10))
        found = doctor.check_store(settings)
        assert found.health is Health.BROKEN
        assert "No space left" in found.says
        assert doctor.check_disk(settings).health is Health.BROKEN
        assert [path.name for path in folder.iterdir()] == ["rest"]


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "ro") as folder:
        found = doctor.check_store(Settings(data_dir=folder / "data"))
        assert found.health is Health.BROKEN
        assert "Read-only" in found.says


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert doctor.check_store(Settings(data_dir=tmp_path / "data")).health is Health.BROKEN
    assert doctor.check_store(Settings(data_dir=tmp_path / "data" / "below")).health is Health.BROKEN


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    under: list[str] = []
    if os.geteuid() == 0:  # who may look into every folder, unless that is taken away
        lost = "-dac_override,-dac_read_search"
        under = ["setpriv", f"--bounding-set={lost}", f"--inh-caps={lost}"]
        os.chown(private, 65534, 65534)
    else:
        private.chmod(0)
    done = run("--json", "--device", "cpu", "--data-dir", str(private / "data"), under=under,
               TRITON_CACHE_DIR=str(private / "triton"))  # fmt: skip
    assert done.returncode == 1, done.stderr
    parts = {row["part"]: row for row in json.loads(done.stdout)["findings"]}
    assert {"versions", "memory", "device", "compiler"} <= set(parts)  # the rest is told all the same
    for part, health in {"redis": "broken", "store": "broken", "disk": "broken", "kernel cache": "warning"}.items():
        assert parts[part]["health"] == health
        assert "Permission denied" in parts[part]["says"]
        assert parts[part]["todo"]


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 2500], ids=["name", "path"])
def test_a_folder_of_a_name_that_is_too_long(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path / name)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / name))
    [redis] = doctor.check_redis(settings)
    for found in (redis, doctor.check_store(settings), doctor.check_disk(settings)):
        assert found.health is Health.BROKEN
    for found in (redis, doctor.check_store(settings), doctor.check_disk(settings), doctor_host.check_kernel_cache()):
        assert "too long" in found.says
        assert len(found.says) < 400


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")  # as for a user of no name without HOME

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert doctor_host.check_kernel_cache().health is Health.WARNING


def test_keys_are_counted_and_not_told(tmp_path: Path) -> None:
    keys = [new_key(f"k{n}", ["segment"])[1] for n in range(3)]
    file = tmp_path / "keys"
    file.write_text(f"{keys[1].line()}\n{keys[2].line()}\n")
    found = doctor.check_keys(Settings(api_keys=(keys[0].line(),), api_keys_file=file, host="0.0.0.0"))
    assert (found.health, found.facts["count"]) == (Health.FINE, 3)
    assert not any(key.sha256 in str(found.as_dict()) for key in keys)
    assert doctor.check_keys(Settings()).health is Health.FINE
    assert doctor.check_keys(Settings(host="0.0.0.0")).health is Health.WARNING
    file.write_text("hunter2")
    for settings in (Settings(api_keys_file=file), Settings(api_keys_file=tmp_path / "none")):
        found = doctor.check_keys(settings)
        assert found.health is Health.BROKEN
        assert "HYPERSAM_API_KEYS_FILE" in found.says
        assert "hunter2" not in str(found.as_dict())


def test_room_for_two_uploads(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=128m") as folder:
        assert doctor.check_disk(Settings(data_dir=folder, max_upload_bytes=1 << 20)).health is Health.FINE
        assert doctor.check_disk(Settings(data_dir=folder, max_upload_bytes=1 << 30)).health is Health.WARNING


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_host.check_compiler(needed=True).health is Health.FINE
    monkeypatch.setenv("CC", "false")
    assert "cannot compile" in doctor_host.check_compiler(needed=True).says
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_host.check_compiler(needed=True).health is Health.BROKEN
    assert doctor_host.check_compiler(needed=False).health is Health.WARNING


def test_headers_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("C_INCLUDE_PATH", "")
    found = doctor_host.check_compiler(needed=True)
    assert found.health is Health.BROKEN
    assert "Python.h" in found.says


def test_memory_is_compared_with_what_models_may_take() -> None:
    assert doctor_host.check_memory(Settings(resident_bytes=1, embedding_cache_bytes=0)).health is Health.FINE
    assert doctor_host.check_memory(Settings(resident_bytes=1 << 60)).health is Health.WARNING


@pytest.mark.parametrize(
    ("limit", "used", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_of_a_container(limit: str, used: str, cached: str, tmp_path: Path) -> None:
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    for name, text in (
        (limit, "1000"),
        (used, "700"),
        (str(Path(limit).parent / "memory.stat"), f"anon 300\n{cached} 400"),
    ):
        (tmp_path / name).write_text(text + "\n")
    assert doctor_host.available_memory(tmp_path) == 1000 - (700 - 400)
    (tmp_path / limit).write_text("max\n")
    assert (doctor_host.available_memory(tmp_path) or 0) > 1 << 20


def test_a_device_that_hangs() -> None:
    [found] = doctor.check_device(Settings(device="cpu"), timeout=0.01)
    assert found.health is Health.BROKEN
    assert "did not answer" in found.says


def test_the_log_of_the_start(tmp_path: Path, redis: EmbeddedRedis, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypersam.doctor")
    settings = Settings(data_dir=tmp_path, redis_url=redis.url, device="cpu", max_upload_bytes=1 << 60)
    doctor.log_at_start(settings, "worker").join(60)
    lines = {line["part"]: line for line in (json.loads(JsonFormatter().format(row)) for row in caplog.records)}
    assert set(lines) == {"versions", "redis", "store", "disk", "memory", "kernel cache"}
    disk = lines["disk"]
    assert (disk["level"], disk["health"]) == ("warning", "warning")
    assert disk["todo"] in disk["message"]
    assert disk["facts"]["free_bytes"] < 2 << 60
