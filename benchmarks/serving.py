"""A service to be measured: real processes, real HTTP on loopback, a compressed model."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image

from hypersam.demo import free_port, wait_until_ready
from hypersam.scenes import make_scene

MODEL = "bench"


@dataclass(frozen=True)
class Served:
    """Where the service is, its process, and its data folder."""

    url: str
    pid: int
    data: Path

    def artifact(self) -> Path:
        """The compressed model's file."""
        return next((self.data / "artifacts").glob("*.hsam"))


@contextlib.contextmanager
def service(checkpoint: Path, **settings: str) -> Iterator[Served]:
    """Start the service with these settings, compress the checkpoint, and stop it in the end."""
    with tempfile.TemporaryDirectory() as data, started(Path(data), **settings) as (served, client):
        with checkpoint.open("rb") as file:
            job = client.post("/compress", files={"file": file}, data={"name": MODEL}).raise_for_status().json()
        while job["state"] in ("queued", "running"):
            time.sleep(0.2)
            job = client.get(f"/jobs/{job['id']}").raise_for_status().json()
        if job["state"] != "succeeded":
            raise SystemExit(str(job["error"]))
        yield served


@contextlib.contextmanager
def started(data: Path, **settings: str) -> Iterator[tuple[Served, httpx.Client]]:
    """The service on a data folder, once it is ready, and a client of it."""
    port = free_port()
    environment = environment_for(data, port, settings)
    server = subprocess.Popen([sys.executable, "-m", "hypersam.cli", "serve"], env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            wait_until_ready(client, server)
            yield Served(f"http://127.0.0.1:{port}", server.pid, data), client
    finally:
        server.terminate()
        server.wait(60)


def environment_for(data: Path, port: int, settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a service with these settings."""
    own = {"data_dir": str(data), "port": str(port), "log_level": "error", "register_default": "false", **settings}
    return os.environ | {f"HYPERSAM_{name.upper()}": value for name, value in own.items()}


def picture(number: int, side: int = 256) -> bytes:
    """A generated scene as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(make_scene(number, size=side).image).save(out, format="PNG")
    return out.getvalue()
