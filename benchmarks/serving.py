"""Time of POST /segment over real HTTP: cold, with a new picture, with a cached embedding, and the service's share."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from benchmarks.record import append
from hypersam.demo import free_port, wait_until_ready
from hypersam.scenes import make_scene


def run(checkpoint: Path, requests: int) -> dict[str, Any]:
    """Serve, compress, and time requests one after another from one client."""
    with tempfile.TemporaryDirectory() as data:
        port = free_port()
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "hypersam.cli",
                "serve",
                "--data-dir",
                data,
                "--port",
                str(port),
                "--log-level",
                "error",
            ]
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                wait_until_ready(client, server)
                _compress(client, checkpoint)
                row = _measure(client, requests)
        finally:
            server.terminate()
            server.wait(60)
    row = {"model": checkpoint.stem, "requests": requests, **row}
    append("serving", row)
    return row


def _compress(client: httpx.Client, checkpoint: Path) -> None:
    with checkpoint.open("rb") as file:
        job = client.post("/compress", files={"file": file}, data={"name": "bench"}).raise_for_status().json()
    while job["state"] in ("queued", "running"):
        time.sleep(0.2)
        job = client.get(f"/jobs/{job['id']}").raise_for_status().json()
    if job["state"] != "succeeded":
        raise SystemExit(str(job["error"]))


def _measure(client: httpx.Client, requests: int) -> dict[str, Any]:
    side = 256

    def ask(number: int) -> tuple[float, dict[str, float]]:
        out = io.BytesIO()
        Image.fromarray(make_scene(number, size=side).image).save(out, format="PNG")
        began = time.perf_counter()
        answer = client.post(
            "/segment",
            files={"image": ("a.png", out.getvalue(), "image/png")},
            data={"model": "bench", "points": json.dumps([[side / 2, side / 2]]), "labels": "[1]"},
        ).raise_for_status()
        return 1000 * (time.perf_counter() - began), answer.json()["timings"]

    cold, _ = ask(0)
    fresh = [ask(n) for n in range(1, requests + 1)]
    cached = [ask(1) for _ in range(requests)]
    row: dict[str, Any] = {"cold_ms": cold}
    for kind, found in (("new_picture", fresh), ("cached", cached)):
        row[f"{kind}_p50_ms"] = statistics.median(t for t, _ in found)
        row[f"{kind}_model_p50_ms"] = statistics.median(_model(t) for _, t in found)
        row[f"{kind}_service_p50_ms"] = statistics.median(t - _model(laps) for t, laps in found)
    return row


def _model(laps: dict[str, float]) -> float:
    return laps["encode"] + laps["decode"]
