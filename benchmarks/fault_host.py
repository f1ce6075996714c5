"""A service that can be killed and started again on its data folder, and what is held against it afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.serving import environment_for
from hypersam.demo import free_port
from kernels.artifact import open_artifact
from kernels.errors import ArtifactError

PATIENCE = 120.0
"""Seconds after which what has not ended counts as lost."""
FINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Tally:
    """What came of the tries of one fault."""

    fault: str
    lost: int = 0
    partial: int = 0
    failed: int = 0
    """Jobs that ended with an error of their own: not lost, and told of."""
    seconds: list[float] = field(default_factory=list)
    """From each fault to what its case calls recovered."""
    skipped: str = ""


class Host:
    """``hypersam serve``, its Redis and its workers."""

    def __init__(self, data: Path, *, within: Mapping[str, str] | None = None, **settings: str) -> None:
        self.data = data
        port = free_port()
        chosen = {"worker_heartbeat": "1", "device": "cpu", "log_level": "critical", **settings}
        self.environment = environment_for(data, port, chosen) | {"OMP_NUM_THREADS": "1"} | dict(within or {})
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.log = (data.parent / "service.log").open("ab")
        self._number = 0
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes work."""
        command = [sys.executable, "-m", "hypersam.cli", "serve"]
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
        self.wait_until_working()

    def wait_until_working(self) -> None:
        """Until Redis, the store and a worker are there."""

        def works() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self.http.get("/readyz", params={"need": "compress"}).status_code == 200
            return False

        if not until(works):
            said = Path(self.log.name).read_text(errors="replace")[-2000:]
            raise SystemExit(f"the service does not come back: {self.http.get('/readyz?need=compress').text}\n{said}")

    def kill(self) -> None:
        """SIGKILL to the API, which takes its workers and its Redis with it."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for each in family:  # a Redis that another process of ours would take over is to be gone as well
            with contextlib.suppress(psutil.NoSuchProcess):
                each.wait(20)

    def stop(self) -> None:
        """End it in order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.http.close()
        self.log.close()

    def redis(self) -> psutil.Process:
        """Its Redis."""
        [server] = [each for each in psutil.Process(self.process.pid).children() if each.name() == "redis-server"]
        return server

    def horses(self) -> list[psutil.Process]:
        """The processes of jobs that run now."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [each] if "workers.horse" in each.cmdline() else []
        return found

    def compress(self, checkpoint: Path, **fields: str) -> httpx.Response:
        """Ask for a model of a new name."""
        self._number += 1
        given = {"name": f"m{self._number}", "codec": "lattice", "policy": "equal_error", "fidelity": "false", **fields}
        with checkpoint.open("rb") as file:
            return self.http.post("/compress", files={"file": file}, data=given)

    def submit(self, checkpoint: Path, **fields: str) -> str:
        """The same, for an id of a job; ends the benchmark where that is refused."""
        return str(self.compress(checkpoint, **fields).raise_for_status().json()["id"])

    def job(self, job_id: str) -> dict[str, Any] | None:
        """The job; None while it cannot be asked for, and where nobody knows it."""
        with contextlib.suppress(httpx.TransportError):
            answer = self.http.get(f"/jobs/{job_id}")
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found
        return None

    def ended(self, job_id: str) -> dict[str, Any] | None:
        """Wait for a job's end; None if it does not come to one."""
        ends: list[dict[str, Any]] = []

        def ended() -> bool:
            job = self.job(job_id)
            ends.extend([job] if job is not None and job["state"] in FINAL else [])
            return bool(ends)

        return ends[0] if until(ended) else None

    def running(self, job_id: str) -> bool:
        """Wait until a job runs (True), or has ended already (False)."""
        seen = ""

        def under_way() -> bool:
            nonlocal seen
            seen = str((self.job(job_id) or {}).get("state"))
            return seen == "running" or seen in FINAL

        until(under_way, every=0.01)
        return seen == "running"

    def judge(self, tally: Tally, jobs: list[str]) -> None:
        """Count the jobs that are lost, and what half-made there is once nothing runs any more."""
        for job_id in jobs:
            job = self.ended(job_id)
            if job is None or (
                job["state"] == "failed" and (job["error"] or {}).get("code") in (None, "internal_error")
            ):
                tally.lost += 1
            elif job["state"] == "failed":
                tally.failed += 1
            elif self.http.get(job["result"]["url"]).status_code != 200:
                tally.lost += 1
        tally.partial += len(self.bad_artifacts())
        if not until(lambda: not self.left_behind(), patience=10):
            tally.partial += len(self.left_behind())

    def bad_artifacts(self) -> list[str]:
        """Listed models whose file, as it is downloaded, is not what its registration says, or cannot be read."""
        bad = []
        for model in self.http.get("/models").raise_for_status().json()["models"]:
            answer = self.http.get(f"/models/{model['id']}/artifact")
            digest = answer.headers.get("etag", "").strip('"')
            with tempfile.NamedTemporaryFile(suffix=".hsam") as file:
                file.write(answer.content)
                file.flush()
                try:
                    if answer.status_code != 200 or hashlib.sha256(answer.content).hexdigest() != digest:
                        raise ArtifactError("another content")
                    open_artifact(Path(file.name), verify=True).close()
                except ArtifactError:
                    bad.append(model["id"])
        return bad

    def left_behind(self) -> list[Path]:
        """Half-made files, jobs' folders, and artifacts that no name stands for (with a store of this disk's)."""
        found = [*self.data.rglob("*.part"), *(self.data / "work").iterdir()]
        if "HYPERSAM_STORE_URL" not in self.environment:
            named = {path.read_text() for path in (self.data / "models").glob("*.json")}
            found += [
                path for path in (self.data / "artifacts").iterdir() if not any(path.stem in text for text in named)
            ]
        return found


@contextlib.contextmanager
def hosted(data: Path | None = None, **settings: Any) -> Iterator[Host]:
    """A service of its own for one case."""
    with tempfile.TemporaryDirectory(prefix="hypersam-faults-") as folder:
        host = Host(data or Path(folder) / "data", **settings)
        try:
            yield host
        finally:
            host.stop()


def until(what: Callable[[], bool], *, patience: float = PATIENCE, every: float = 0.05) -> bool:
    """Ask again and again; whether it became true in time."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(every)
    return False


def killed(process: psutil.Process) -> None:
    """SIGKILL, and wait until it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
