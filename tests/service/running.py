"""The service as it really runs: its own processes, a real Redis, real HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from hypersam.images import from_rle
from hypersam.settings import Settings

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from hypersam.cli.serve import serve
from hypersam.settings import Settings
sys.exit(serve(Settings()))
"""
START_TIMEOUT = 120.0
JOB_TIMEOUT = 90.0


class Process:
    """A child process whose output is kept for the message of a failing test; ``within``: what it is started by."""

    def __init__(self, command: list[str], settings: Settings, *, within: tuple[str, ...] = ()) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYPERSAM_")}
        environment = {**inherited, **settings.environment(), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*within, *command], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self.lines.extend(iter(stream.readline, ""))

    def output(self) -> str:
        return "".join(list(self.lines))

    def wait_for(self, text: str, timeout: float = START_TIMEOUT) -> str:
        """Return the first line with ``text``."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if text in line:
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no line with {text!r}; status {self.process.poll()}:\n{self.output()}")

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not stop within {timeout} s:\n{self.output()}") from None
        finally:
            self._reader.join(5)
        return status


class Api(Process):
    """The whole of ``hypersam serve``."""

    def __init__(self, settings: Settings, *, within: tuple[str, ...] = ()) -> None:
        super().__init__([sys.executable, "-c", SERVE], settings, within=within)
        self.settings = settings
        self.url = self.wait_for("hypersam is ready at").split()[4]
        # Room for every thread of a test: a pool with too many idle connections may close one that another thread has
        # just been given. The service closes those that were idle for 5 seconds.
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=200, keepalive_expiry=4)
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=limits)

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 30) -> int:
        self.http.close()
        return super().stop(sig, timeout)

    def compress(self, checkpoint: Path | bytes, filename: str = "model.pth", **fields: str) -> httpx.Response:
        """By the codec that needs no measuring, unless ``fields`` say otherwise: these tests are about the service."""
        content = checkpoint if isinstance(checkpoint, bytes) else checkpoint.read_bytes()
        fields = {"codec": "birkhoff", "fidelity": "false"} | fields
        return self.http.post("/compress", files={"file": (filename, content)}, data=fields)

    def wait_job(self, job_id: str, timeout: float = JOB_TIMEOUT) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job: dict[str, Any] = self.http.get(f"/jobs/{job_id}").json()
            if job["state"] in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(0.05)
        raise AssertionError(f"job {job_id} did not end: {job}\n{self.output()}")

    def make_model(self, checkpoint: Path, name: str) -> dict[str, Any]:
        response = self.compress(checkpoint, name=name)
        assert response.status_code == 202, response.text
        job = self.wait_job(response.json()["id"])
        assert job["state"] == "succeeded", (job, self.output())
        return job


class WorkerProcess(Process):
    """One ``python -m workers``."""

    def __init__(self, settings: Settings) -> None:
        super().__init__([sys.executable, "-m", "workers"], settings)
        self.wait_for("Listening on")


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.stop()


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Every error is a problem document with the right status and code."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["type"] == f"urn:hypersam:problem:{code}"
    return body


def picture(width: int = 96, height: int = 64, *, seed: int = 0, form: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def best(api: Api, model: str, image: bytes, **prompt: Any) -> tuple[np.ndarray, float]:
    """The best mask of three, (H, W), by ``POST /segment``, and its score."""
    body = {"model": model, "image": base64.b64encode(image).decode(), "multimask": True, **prompt}
    mask = api.http.post("/segment", json=body).raise_for_status().json()["masks"][0]
    return from_rle(mask["segmentation"]), mask["score"]
