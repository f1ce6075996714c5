"""Whether everything that the service needs is there and works, in plain words: ``hypersam doctor``.

Each check asks the real thing (a file is written, Redis takes a key, a compiler compiles) and says what to do when it
does not work. What needs torch runs in a process of its own (``hypersam.doctor_device``): a broken driver may hang or
crash, and the process that waits for jobs must not open a GPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from hypersam.doctor_host import check_compiler, check_kernel_cache, check_memory, nearest, short, there
from hypersam.embedded_redis import find_redis_server
from hypersam.errors import BadSettings, HypersamError, Unavailable
from hypersam.findings import Finding, Health, broken, fine, warning
from hypersam.jobs import JobBoard, client_of
from hypersam.settings import GIB, MIB, Settings

log = logging.getLogger(__name__)

OLDEST_REDIS = (6, 2)  # what the tests run against
LEAST_FREE = 64 * MIB  # bytes: with less, registrations and probes already fail now and then
PROBE_SECONDS = 120.0  # for the device: loading torch and compiling one kernel takes several, a hung driver for ever
_PATIENCE = 2.0  # seconds for Redis
_HERE = ("127.0.0.1", "::1", "localhost")  # addresses that no other machine reaches
_FOLDER = "let the user that runs hypersam read and write the data folder, or name another in HYPERSAM_DATA_DIR"


def examine(settings: Settings, *, device: bool = True) -> list[Finding]:
    """Run every check and return what they found, in a fixed order. Takes seconds; nothing is left behind.

    ``device=False`` leaves out what starts processes: the device, the compilation of a kernel, the C compiler.
    """
    found = [check_versions(), *check_redis(settings), check_store(settings), *check_objects(settings),
             check_disk(settings), check_memory(settings), check_keys(settings), check_kernel_cache()]  # fmt: skip
    if device:
        probed = check_device(settings)
        gpu = any(finding.facts.get("type") == "cuda" for finding in probed)
        found += [*probed, check_compiler(needed=gpu)]
    return found


def worst(findings: list[Finding]) -> Health:
    """Return the state of the whole."""
    order = list(Health)
    return max((finding.health for finding in findings), key=order.index, default=Health.FINE)


def log_at_start(settings: Settings, who: str) -> threading.Thread:
    """Examine everything in the background and log each finding: the self-check of a process that starts.

    The device and the compiler are tried only where there is an NVIDIA driver, so that starting costs a host without
    one nothing, and workers are not counted, since they start at the same time. Keys are no matter of a worker's, which
    answers nobody. The findings travel as ``extra`` fields (part, health, todo, facts) for logs in JSON.
    """
    left_out = {"workers"} if who == "service" else {"workers", "keys"}

    def check() -> None:
        levels = {Health.FINE: logging.INFO, Health.WARNING: logging.WARNING, Health.BROKEN: logging.ERROR}
        for finding in examine(settings, device=settings.device != "cpu" and driver_version() is not None):
            if finding.part in left_out:
                continue
            says = finding.says if finding.todo is None else f"{finding.says}; {finding.todo}"
            log.log(levels[finding.health], "self-check of the %s: %s: %s", who, finding.part, says,
                    extra={"part": finding.part, "health": str(finding.health), "todo": finding.todo,
                           "facts": dict(finding.facts)})  # fmt: skip

    thread = threading.Thread(target=check, name="hypersam-self-check", daemon=True)
    thread.start()
    return thread


def check_versions() -> Finding:
    """Compare what is installed with what the package asks for."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    wrong = []
    for line in _requirements():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found[needed.name] = version(needed.name)
        except PackageNotFoundError:
            found[needed.name] = None
            wrong.append(f"{needed.name} is not installed")
            continue
        if not needed.specifier.contains(version(needed.name), prereleases=True):
            wrong.append(f"{needed.name} is {version(needed.name)}, needed is {needed.specifier}")
    if wrong:
        return broken("versions", "; ".join(wrong), "install hypersam anew with pip", **found)
    short = ", ".join(
        f"{name} {found[name]}" for name in ("python", "torch", "triton", "rq", "redis") if found.get(name)
    )
    return fine("versions", short, **found)


def _requirements() -> list[str]:
    try:
        return requires("hypersam") or []
    except PackageNotFoundError:  # run from a folder that is not installed
        return []


def probe_connection(settings: Settings) -> Redis | None:
    """Return a client that answers or fails within seconds; None where no Redis is named and none of ours runs.

    Raises BadSettings for an address that is none, OSError where the data folder cannot be looked into.
    """
    retry = Retry(NoBackoff(), 0)
    if settings.redis_url is not None:
        return client_of(settings.redis_url, socket_connect_timeout=_PATIENCE, socket_timeout=_PATIENCE, retry=retry)
    socket = settings.data_dir.absolute() / "redis" / "redis.sock"
    return Redis(unix_socket_path=str(socket), socket_timeout=_PATIENCE, retry=retry) if there(socket) else None


def check_redis(settings: Settings) -> list[Finding]:
    """Redis: reached, new enough, takes writes, keeps them over a restart, drops none; and who listens to the queue."""
    try:
        connection = probe_connection(settings)
    except BadSettings as error:
        return [broken("redis", str(error), "give redis://host:6379/0 or the like")]
    except OSError as error:
        return [broken("redis", f"none is configured, and one of ours cannot be looked for: {error.strerror}", _FOLDER)]
    if connection is None:
        try:
            binary = find_redis_server()
        except Unavailable as error:
            return [broken("redis", "none is configured, and there is none to start", str(error))]
        return [fine("redis", f"none is configured; `hypersam serve` starts {binary}", binary=str(binary))]
    with contextlib.closing(connection):
        try:
            info: Any = connection.info()
            connection.set(f"hypersam:doctor:{uuid.uuid4().hex}", 1, px=1000)
            finding = _redis(info)
        except (RedisError, OSError) as error:
            todo = ("start it, or correct HYPERSAM_REDIS_URL and its password; "
                    "without it models are served and nothing can be compressed")  # fmt: skip
            return [broken("redis", f"cannot be used: {error}", todo)]
        try:
            return [finding, _workers(settings, connection)]
        except (RedisError, HypersamError) as error:
            return [finding, broken("workers", f"cannot be counted: {error}", "look at Redis's log")]


def _redis(info: Mapping[str, Any]) -> Finding:
    number = str(info["redis_version"])
    facts = {"version": number, "append_only": bool(info.get("aof_enabled")), "policy": info.get("maxmemory_policy"),
             "used_bytes": info.get("used_memory")}  # fmt: skip
    if info.get("aof_last_write_status", "ok") != "ok":
        return broken("redis", "its last write to disk failed", "free space on Redis's disk", **facts)
    if tuple(int(part) for part in number.split(".")[:2]) < OLDEST_REDIS:
        return warning("redis", f"version {number} is older than what is tested", "use Redis 6.2 or newer", **facts)
    if not facts["append_only"]:
        return warning("redis", f"version {number} keeps no append-only file, so a crash loses jobs",
                       "start it with --appendonly yes", **facts)  # fmt: skip
    if int(info.get("maxmemory") or 0) and facts["policy"] != "noeviction":
        return warning("redis", f"drops keys when its memory is full ({facts['policy']}), jobs among them",
                       "start it with --maxmemory-policy noeviction", **facts)  # fmt: skip
    return fine("redis", f"version {number}, takes writes, append-only", **facts)


def _workers(settings: Settings, connection: Redis) -> Finding:
    queue = JobBoard.queue_of(connection)
    alive, waiting = JobBoard.alive_workers(queue, settings), int(queue.count)
    if alive:
        return fine("workers", f"{alive} alive, {waiting} jobs wait", alive=alive, waiting=waiting)
    return warning("workers", f"none is alive, {waiting} jobs wait",
                   "start one with `python -m workers`; a service that runs its own shows them here within seconds",
                   alive=0, waiting=waiting)  # fmt: skip


def check_store(settings: Settings) -> Finding:
    """Write a file in the data folder, flush it to the disk, rename it and read it back."""
    root = folder = settings.data_dir.absolute()
    try:
        folder = nearest(root)
    except OSError as error:
        return broken("store", f"{short(root)} cannot be looked into: {error.strerror}", _FOLDER, errno=error.errno)
    first = folder / f".doctor-{uuid.uuid4().hex}"
    second = first.with_suffix(".renamed")
    content = os.urandom(64 << 10)
    began = time.perf_counter()
    try:
        with first.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        first.replace(second)
        if second.read_bytes() != content:
            return broken("store", f"{folder} gives back other bytes than were written", "replace this disk")
    except OSError as error:
        return broken("store", f"{folder} cannot be written: {error.strerror}",
                      "free space there, give it to the user that runs hypersam, or name another in HYPERSAM_DATA_DIR",
                      folder=str(root), errno=error.errno)  # fmt: skip
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    took = time.perf_counter() - began
    new = "" if folder == root else f" (not there yet; {folder} can be written)"
    return fine("store", f"{root}{new}: written, renamed, read back in {took * 1000:.0f} ms", folder=str(root),
                seconds=round(took, 4))  # fmt: skip


def check_objects(settings: Settings) -> list[Finding]:
    """Ask the object store, where there is one, for an object."""
    if not settings.store_url:
        return []
    from hypersam.store.objects import reach

    try:
        reach(settings)
    except HypersamError as error:
        said = str(error)
        why = str(error.__cause__ or "").partition("\n")[0]  # the client's own state follows
        if why and why not in said:
            said = f"{said}: {why}"
        todo = "see whether HYPERSAM_STORE_ENDPOINT is reached from here, the bucket exists and AWS_… opens it"
        return [broken("object store", f"{settings.store_url}: {said}"[:500], todo)]
    return [fine("object store", f"{settings.store_url} answers")]


def check_disk(settings: Settings) -> Finding:
    """Tell how much room the data folder's disk has."""
    root = settings.data_dir.absolute()
    try:
        total, _, free = shutil.disk_usage(nearest(root))
    except OSError as error:
        return broken("disk", f"that of {short(root)} cannot be asked: {error.strerror}",
                      f"see whether it is mounted; {_FOLDER}", errno=error.errno)  # fmt: skip
    facts = {"free_bytes": free, "total_bytes": total}
    if free < LEAST_FREE:
        return broken(
            "disk", f"{free / MIB:.0f} MiB are free", "delete models or uploads, or use a larger disk", **facts
        )
    # The upload, and as much again for what the job writes.
    if free < 2 * settings.max_upload_bytes:
        return warning("disk", f"{free / GIB:.1f} GiB are free, less than twice the largest upload that is taken",
                       "use a larger disk or lower HYPERSAM_MAX_UPLOAD_BYTES", **facts)  # fmt: skip
    return fine("disk", f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free", **facts)


def check_keys(settings: Settings) -> Finding:
    """Read the API keys, and tell how many there are; never which."""
    try:
        count = len(settings.keys())
    except BadSettings as error:
        return broken("keys", str(error), "correct it; the service does not start without the keys that it is to have")
    if count or settings.host in _HERE:
        says = f"{count} configured" if count else f"none, and only {settings.host} is listened on"
        return fine("keys", says, count=count)
    return warning("keys", f"none: whoever reaches {settings.host} may do everything",
                   "make one with `hypersam keys new`, unless nobody else reaches this address", count=0)  # fmt: skip


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver as its kernel module tells it, or None where none is loaded."""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    return "unknown" if Path("/dev/nvidiactl").exists() else None


def check_device(settings: Settings, *, timeout: float = PROBE_SECONDS) -> list[Finding]:
    """Open the device and compile a kernel for it, in a process of its own that may take ``timeout`` seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "hypersam.doctor_device", settings.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return [broken("device", f"did not answer within {timeout:.0f} s", "look at nvidia-smi and the system's log")]
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return [broken("device", f"cannot be opened: {last}", "install torch anew, and see whether nvidia-smi works")]
    return list(_findings(json.loads(lines[-1])))


def _findings(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    driver = driver_version()
    for row in rows:
        facts = row["facts"] | ({"driver": driver} if row["part"] == "device" else {})
        yield Finding(row["part"], Health(row["health"]), row["says"], row["todo"], facts)
