"""``hypersam serve``: Redis, the API and the workers, all in one, and all gone when it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from redis import RedisError

from hypersam import logs
from hypersam.codecs import CODEC_VERSION, DEFAULT_CODEC
from hypersam.embedded_redis import EmbeddedRedis
from hypersam.errors import BadSettings, HypersamError, NameTaken
from hypersam.job_spec import JobSpec
from hypersam.jobs import JobBoard, client_of, connect
from hypersam.options import check_options
from hypersam.settings import Settings
from hypersam.store import open_at_start, open_store

log = logging.getLogger(__name__)

CARRIED_SAM = Path(__file__).parents[1] / "assets" / "small_sam.pth"
WARM_SECONDS = 4.0  # time for a running job to end before it is given up for a later retry
_RESTART_SECONDS = (0.5, 30.0)  # pause before a dead worker is replaced: first, longest
_STEADY_SECONDS = 60.0  # a worker that lived this long is replaced at once again
_COPY_BLOCK = 4 << 20


class WorkerPool:
    """Keeps ``count`` worker processes running, each ``python -m workers``, until ``stop``."""

    def __init__(self, settings: Settings, count: int) -> None:
        self._environment = {**os.environ, **settings.environment(), "HYPERSAM_PARENT": str(os.getpid())}
        self._stopping = threading.Event()
        self._slots: list[subprocess.Popen[bytes] | None] = [None] * count
        self._threads = [threading.Thread(target=self._keep, args=(slot,), daemon=True) for slot in range(count)]

    def start(self) -> None:
        """Start the workers and those who watch them."""
        for thread in self._threads:
            thread.start()

    def pids(self) -> list[int]:
        """Return the process ids of the workers that run now."""
        return [process.pid for process in self._slots if process is not None and process.poll() is None]

    def stop(self) -> None:
        """End all workers: first let running jobs finish, then give them up, then use force."""
        self._stopping.set()
        for sig, patience in ((signal.SIGTERM, WARM_SECONDS), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for process in self._running():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(sig)
            deadline = time.monotonic() + patience
            while self._running() and time.monotonic() < deadline:
                time.sleep(0.02)
        for thread in self._threads:
            thread.join(timeout=5)

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._slots if process is not None and process.poll() is None]

    def _keep(self, slot: int) -> None:
        # One thread a worker, for as long as it runs: the system ties 'die with the parent' to this thread.
        pause, longest = _RESTART_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            # A session of its own: Ctrl-C in the terminal reaches us, and we stop the workers in order.
            process = subprocess.Popen(
                [sys.executable, "-m", "workers"], env=self._environment, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            self._slots[slot] = process
            status = process.wait()
            if self._stopping.is_set():
                return
            log.warning("worker %d (pid %d) ended with status %d; starting another", slot, process.pid, status)
            if time.monotonic() - began > _STEADY_SECONDS:
                pause = _RESTART_SECONDS[0]
            self._stopping.wait(pause)
            pause = min(2 * pause, longest)


def register_carried(settings: Settings) -> None:
    """Queue the compression of the small SAM that the package carries, unless its name is in use."""
    if not settings.register_default or not CARRIED_SAM.is_file():
        return
    store = open_store(settings)
    if store.find(settings.default_model) is not None:
        return
    upload = store.new_upload(settings.max_upload_bytes)
    try:
        with CARRIED_SAM.open("rb") as file:
            while block := file.read(_COPY_BLOCK):
                upload.write(block)
        spec = JobSpec(
            name=settings.default_model,
            source_sha256=upload.finish(),
            codec=DEFAULT_CODEC,
            codec_version=CODEC_VERSION,
            options=check_options(DEFAULT_CODEC),
        )
        upload.stage()
        with contextlib.closing(connect(settings)) as connection:
            JobBoard(connection, store, settings).submit(spec, upload.commit)
    except NameTaken:
        log.info("a job is making a model of the name %s already", settings.default_model)
    finally:
        upload.discard()


def announce(url: str) -> None:
    """Say where the service is."""
    print(f"hypersam is ready at {url} (its interface: {url}/docs)", flush=True)


def serve(settings: Settings, *, ready: Callable[[str], None] = announce) -> int:
    """Run everything until SIGINT or SIGTERM; return the exit status.

    Without ``settings.redis_url`` a Redis is started in the data folder. ``ready`` is called with the API's
    address once it accepts requests. Raises HypersamError if something cannot start.
    """
    _check(settings)
    logs.configure(settings)
    try:
        return _serve(settings, ready)
    except SystemExit as end:  # by a signal
        return end.code if isinstance(end.code, int) else 1


def _check(settings: Settings) -> None:
    """Try, before anything is started, what is only found out in use. Raises BadSettings."""
    settings.keys()
    if settings.redis_url is not None:
        client_of(settings.redis_url).close()
    open_at_start(settings)


def _serve(settings: Settings, ready: Callable[[str], None]) -> int:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals_end_politely())
        sockets = [stack.enter_context(each) for each in _bound(settings)]
        if settings.redis_url is None:
            redis = stack.enter_context(EmbeddedRedis(settings.data_dir))
            redis.keep()
            settings = settings.model_copy(update={"redis_url": redis.url})
        pool = WorkerPool(settings, settings.workers)
        stack.callback(pool.stop)  # after the API, before Redis
        pool.start()
        try:
            register_carried(settings)
        except (HypersamError, RedisError) as error:
            log.warning("the carried model was not queued: %s", error)
        return _run_api(settings, sockets, ready)


def _bound(settings: Settings) -> list[socket.socket]:
    """Sockets at the service's address, before anything else is started. Raises BadSettings."""
    made: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((row[0], row[4]) for row in found):
            made.append(socket.socket(family, socket.SOCK_STREAM))
            made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made[-1].bind(address)
    except OSError as error:
        for each in made:
            each.close()
        where = f"{settings.host} port {settings.port}"
        raise BadSettings(f"HYPERSAM_HOST and HYPERSAM_PORT: {where} cannot be had: {error.strerror}") from None
    return made


def _run_api(settings: Settings, sockets: list[socket.socket], ready: Callable[[str], None]) -> int:
    # Here: the command line must not load the service for other commands.
    from service.app import create_app
    from service.connection import protocol_for

    config = uvicorn.Config(
        create_app(settings), host=settings.host, port=settings.port, log_level=settings.log_level,
        access_log=settings.log_level == "debug", timeout_graceful_shutdown=settings.drain_seconds, log_config=None,
        lifespan="on", http=protocol_for(settings), ws="none",
        # Nobody is believed by default, and not who connects from this host either, as uvicorn has it.
        proxy_headers=bool(settings.trusted_proxies), forwarded_allow_ips=list(settings.trusted_proxies),
    )  # fmt: skip
    server = _Server(config, ready)
    server.run(sockets)
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Tells when it accepts requests, and at which address if the port was left to the system."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then tell."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


@contextlib.contextmanager
def _signals_end_politely() -> Iterator[None]:
    """Around the API's own handlers: one signal unwinds what was started, and no other disturbs that."""
    unwinding = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal unwinding
        if not unwinding:
            unwinding = True
            raise SystemExit(0)

    before = {sig: signal.signal(sig, stop) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
