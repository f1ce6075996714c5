"""The faults: each starts a service, breaks it in the middle of its work, and waits until it works again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks.fault_host import FINAL, Host, Tally, hosted, killed, until

_FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.pth"\r\n\r\n'
_CLOCK = Path(__file__).with_name("fault_clock.c")


def worker_killed(checkpoint: Path, tries: int, seed: int) -> Iterator[Tally]:
    """The worker with its job's process, and the job's process alone, at random moments. Recovered: the job ended."""
    draw = random.Random(seed)
    with_worker, alone = Tally("worker killed"), Tally("job's process killed")
    with hosted(workers="2") as host:
        began = time.monotonic()
        host.judge(with_worker, [host.submit(checkpoint)])
        usual = time.monotonic() - began
        number = 0
        while len(with_worker.seconds) + len(alone.seconds) < tries:
            tally = alone if number % 2 else with_worker
            job = host.submit(checkpoint)
            host.running(job)
            time.sleep(draw.uniform(0, 0.9 * usual))
            horses = host.horses()
            parents = [parent for horse in horses if (parent := horse.parent()) is not None]
            broken = time.monotonic()
            for process in horses if number % 2 else parents:
                killed(process)
            host.ended(job)
            ended = time.monotonic()
            host.judge(tally, [job])
            if horses:  # else it had ended before its moment came
                tally.seconds.append(ended - broken)
                number += 1
    yield with_worker
    yield alone


def redis_killed(checkpoint: Path, tries: int, seed: int) -> Iterator[Tally]:
    """While jobs wait and run; the service starts it anew. Recovered: a new job was taken."""
    draw, tally = random.Random(seed), Tally("Redis killed")
    with hosted() as host:
        for _ in range(tries):
            jobs = [host.submit(checkpoint) for _ in range(3)]
            host.running(jobs[0])
            time.sleep(draw.uniform(0, 2))
            broken = time.monotonic()
            killed(host.redis())

            def taken() -> bool:
                answer = host.compress(checkpoint)
                if answer.status_code == 202:
                    jobs.append(answer.json()["id"])  # noqa: B023
                return answer.status_code == 202

            until(taken)
            tally.seconds.append(time.monotonic() - broken)
            host.judge(tally, jobs)
    yield tally


def api_killed_in_upload(checkpoint: Path, tries: int, seed: int) -> Iterator[Tally]:
    """The API, and all it started, while a checkpoint comes in. Recovered: the same upload was taken."""
    draw, tally = random.Random(seed), Tally("API killed in an upload")
    content = checkpoint.read_bytes()
    with hosted() as host:
        waiting: list[str] = []
        for _ in range(tries):
            waiting.append(host.submit(checkpoint))  # runs, or waits, meanwhile
            address = urlsplit(host.url)
            with socket.create_connection((address.hostname, address.port), timeout=60) as link:
                form = _FORM + content
                head = "POST /compress HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                link.sendall(f"{head}Content-Length: {len(form) + 7}\r\n\r\n".encode())
                link.sendall(form[: draw.randrange(1 << 20, len(form))])
                until(lambda: any((host.data / "uploads").glob("*.part")))
                host.kill()
                broken = time.monotonic()
                answer = b""
                with contextlib.suppress(ConnectionError):
                    answer = link.recv(1000)
            tally.partial += bool(answer)  # an upload that is not whole was answered for
            host.start()
            waiting.append(host.submit(checkpoint))
            tally.seconds.append(time.monotonic() - broken)
        host.judge(tally, waiting)
    yield tally


def api_killed_in_download(large: Path, tries: int, seed: int) -> Iterator[Tally]:
    """The API while an artifact goes out. The client must see that its file is not whole; then it resumes."""
    draw, tally = random.Random(seed), Tally("API killed in a download")
    with hosted() as host:
        host.judge(tally, [host.submit(large, name="large")])
        for _ in range(tries):
            received, broke = bytearray(), False
            with contextlib.suppress(httpx.TransportError), host.http.stream("GET", "/models/large/artifact") as answer:
                size, etag = int(answer.headers["content-length"]), answer.headers["etag"]
                moment = draw.randrange(size // 10, size // 2)
                broken = 0.0
                broke = True
                for block in answer.iter_raw(1 << 16):
                    received += block
                    if not broken and len(received) >= moment:
                        host.kill()
                        broken = time.monotonic()
                broke = False
            tally.partial += not broke and len(received) != size  # shorter, and passed for whole
            host.start()
            rest = host.http.get(
                "/models/large/artifact", headers={"Range": f"bytes={len(received)}-", "If-Range": etag}
            )
            whole = bytes(received) + rest.content if rest.status_code == 206 else rest.content
            tally.partial += hashlib.sha256(whole).hexdigest() != etag.strip('"')
            tally.seconds.append(time.monotonic() - broken)
        host.judge(tally, [])
    yield tally


def disk_full(checkpoint: Path, tries: int) -> Iterator[Tally]:
    """A small tmpfs as the data folder. Recovered: after room was made, the same request has succeeded."""
    upload, artifact = Tally("disk full, upload"), Tally("disk full, artifact")
    with tempfile.TemporaryDirectory(prefix="hypersam-faults-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        size = 4 * checkpoint.stat().st_size
        mounted = os.geteuid() == 0 and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", data], capture_output=True, check=False
        ).returncode == 0  # fmt: skip
        if not mounted:
            for tally in (upload, artifact):
                tally.skipped = "a tmpfs cannot be mounted here: it takes root"
        else:
            try:
                with hosted(data) as host:
                    for _ in range(tries):
                        _fill(host, checkpoint, upload, room=checkpoint.stat().st_size // 2, status=507)
                    for _ in range(tries):
                        _fill(host, checkpoint, artifact, room=checkpoint.stat().st_size + (1 << 20), status=202)
            finally:
                subprocess.run(["umount", data], check=True)
    yield upload
    yield artifact


def _fill(host: Host, checkpoint: Path, tally: Tally, room: int, status: int) -> None:
    ballast = host.data / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(host.data).free - room)
    name = f"{tally.fault[-1]}{len(tally.seconds)}"
    answer = host.compress(checkpoint, name=name)
    told = answer.json()
    if answer.status_code == 202:
        job = host.ended(told["id"])
        told = (job or {}).get("error") or {}
        tally.failed += 1
    tally.lost += answer.status_code != status or told.get("code") != "store_full"
    tally.partial += len(host.left_behind()) + len(list((host.data / "uploads").iterdir()))
    broken = time.monotonic()
    ballast.unlink()
    job_id = host.submit(checkpoint, name=name)
    done = host.ended(job_id)
    tally.lost += done is None or done["state"] != "succeeded"
    tally.seconds.append(time.monotonic() - broken)
    host.judge(tally, [job_id])


def store_unreachable(checkpoint: Path, tries: int, seed: int) -> Iterator[Tally]:
    """Every way to the object store is cut while a job runs. Recovered: the same request has succeeded."""
    draw, tally = random.Random(seed), Tally("object store unreachable")
    server = os.environ.get("MOTO_SERVER")
    if not server:
        tally.skipped = "no S3 server: MOTO_SERVER names none"
        yield tally
        return
    from benchmarks.fault_relay import Relay, s3

    with s3(server) as port, Relay(port) as relay:
        secrets = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        settings: dict[str, Any] = {
            "store_url": "s3://faults", "store_allow_http": "true", "store_endpoint": f"http://127.0.0.1:{relay.port}",
        }  # fmt: skip
        with hosted(within=secrets, **settings) as host:
            for number in range(tries):
                job = host.submit(checkpoint, name=f"s{number}")
                host.running(job)
                time.sleep(draw.uniform(0, 3))
                relay.cut()
                refused = host.compress(checkpoint)
                tally.lost += refused.status_code != 503 or refused.json().get("code") != "store_unavailable"
                until(lambda job=job: (host.job(job) or {}).get("state") in FINAL, patience=5)  # type: ignore[misc]
                relay.mend()
                broken = time.monotonic()
                host.judge(tally, [job])
                again = host.submit(checkpoint, name=f"s{number}")
                done = host.ended(again)
                tally.lost += done is None or done["state"] != "succeeded"
                tally.seconds.append(time.monotonic() - broken)
            host.judge(tally, [])
    yield tally


def clock_jumps(checkpoint: Path, tries: int) -> Iterator[Tally]:
    """The clock of everything jumps by an hour, there and back, while a job runs. Recovered: the job ended."""
    tally = Tally("clock jumps")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        tally.skipped = "no C compiler for what makes clocks jump"
        yield tally
        return
    with tempfile.TemporaryDirectory() as folder:
        library, clock = Path(folder) / "clock.so", Path(folder) / "offset"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, _CLOCK, "-ldl"], check=True)
        clock.write_bytes(bytes(8))
        within = {"LD_PRELOAD": str(library), "FAULT_CLOCK": str(clock)}
        with hosted(workers="2", within=within) as host:
            for number in range(tries):
                job = host.submit(checkpoint)
                host.running(job)
                told: list[float] = []
                watcher = threading.Thread(target=_watch, args=(host, job, told))
                watcher.start()
                broken = time.monotonic()
                with clock.open("r+b") as file:  # in place: it is mapped
                    file.write(struct.pack("l", 3600 * (1, 0, -1, 0)[number % 4]))
                host.ended(job)
                tally.seconds.append(time.monotonic() - broken)
                watcher.join(30)
                tally.lost += watcher.is_alive() or not told or told[-1] != 1.0  # the events did not come to their end
                host.judge(tally, [job])
    yield tally


def _watch(host: Host, job: str, told: list[float]) -> None:
    """Follow the job's events to their end."""
    address = f"{host.url}/jobs/{job}/events"
    with contextlib.suppress(httpx.TransportError), httpx.stream("GET", address, timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("data:"):
                told.append(json.loads(line[5:])["progress"])
