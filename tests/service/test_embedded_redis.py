from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis

from hypersam import embedded_redis
from hypersam.embedded_redis import EmbeddedRedis, find_redis_server
from hypersam.errors import Unavailable


def test_starts_keeps_its_data_and_ends(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        pid = server.pid
        assert psutil.pid_exists(pid)
        with redis.Redis.from_url(server.url) as client:
            client.set("kept", "yes")
            assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
        assert server.socket.parent == tmp_path / "redis"
    assert not psutil.pid_exists(pid)
    with EmbeddedRedis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"


@pytest.mark.parametrize("name", ["data", "a" * 120], ids=["short", "socket elsewhere"])
def test_a_server_that_is_killed_comes_back_with_its_data(tmp_path: Path, name: str) -> None:
    with EmbeddedRedis(tmp_path / name) as server, redis.Redis.from_url(server.url) as client:
        server.keep()
        for n in range(2):
            client.set("kept", n)
            pid = server.pid
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while server.pid == pid or not answers(server):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert client.get("kept") == b"%d" % n
        last = server.pid
    assert not psutil.pid_exists(last)


def answers(server: EmbeddedRedis) -> bool:
    with contextlib.suppress(redis.RedisError), redis.Redis.from_url(server.url, retry=None) as client:
        return bool(client.ping())
    return False


def test_a_second_owner_is_told(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path), pytest.raises(Unavailable, match=f"process {os.getpid()} already runs"):
        EmbeddedRedis(tmp_path).start()


def test_a_stale_socket_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "redis.sock").touch()
    (tmp_path / "redis" / "owner").write_text("123456\n")
    with EmbeddedRedis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()


def test_a_server_left_behind_is_taken_over(tmp_path: Path) -> None:
    left = EmbeddedRedis(tmp_path)
    left.start()
    assert left._lock is not None
    left._lock.close()  # as the system does when the owner is killed
    assert left._process is not None
    reaper = threading.Thread(target=left._process.wait)  # in life its parent is init, which reaps it
    reaper.start()
    with EmbeddedRedis(tmp_path) as server:
        assert server.pid == left.pid
    reaper.join(5)
    assert not reaper.is_alive()


def test_a_long_path_gets_a_socket_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 120)
    with EmbeddedRedis(folder) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert (folder / "redis" / "redis.log").exists()
        elsewhere = server.socket
    assert not elsewhere.parent.exists()


def test_ends_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hypersam.embedded_redis import EmbeddedRedis\n"
        "server = EmbeddedRedis(Path(sys.argv[1])); server.start(); print(server.pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_no_server_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded_redis, "_BUNDLED", ())
    with pytest.raises(Unavailable, match="apt-get install redis-server"):
        find_redis_server()


def test_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "redis-server"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == mine


def test_a_binary_without_permission_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    bare.write_bytes(find_redis_server().read_bytes())
    bare.chmod(0o600)
    monkeypatch.setattr(embedded_redis, "find_redis_server", lambda: bare)
    with EmbeddedRedis(tmp_path / "data") as server:
        assert server.pid


def test_a_server_that_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded_redis, "find_redis_server", lambda: broken)
    with pytest.raises(Unavailable, match="status 7"):
        EmbeddedRedis(tmp_path / "data").start()
