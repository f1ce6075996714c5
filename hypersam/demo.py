"""The main job on real input, as a user would do it over HTTP: ``python -m hypersam.demo``.

Starts the whole service (Redis, API, one worker) in a temporary folder, uploads the carried small SAM as a
checkpoint, waits for its compression, segments the carried picture with a click, writes the mask, and says
what it did and how the mask compares with the true one.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

OUT = Path("demo")
_START_LIMIT_S = 120
_JOB_LIMIT_S = 600


def main() -> None:
    """Run the demo; exit code 0 only if a mask came back from the compressed model."""
    assets = files("hypersam") / "assets"
    with (
        tempfile.TemporaryDirectory(prefix="hypersam-demo-") as data,
        as_file(assets / "small_sam.pth") as checkpoint,
        as_file(assets / "scenes" / "scene_0.png") as picture,
        as_file(assets / "scenes" / "scene_0.json") as truth,
    ):
        objects = json.loads(truth.read_text())["objects"]
        url = f"http://127.0.0.1:{free_port()}"
        print(f"starting hypersam serve at {url} (Redis, API, one worker)", flush=True)
        server = _serve(Path(data), url)
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                wait_until_ready(client, server)
                name = _compress(client, checkpoint)
                _segment(client, name, picture, objects[0])
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _serve(data: Path, url: str) -> subprocess.Popen[bytes]:
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "hypersam.cli", "serve", "--data-dir", str(data), "--port", port]
    environment = os.environ | {"HYPERSAM_LOG_LEVEL": "warning"}
    return subprocess.Popen(command, env=environment)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    """Ask ``/readyz`` until it answers 200; SystemExit if the server ends or takes too long."""
    began = time.monotonic()
    while time.monotonic() - began < _START_LIMIT_S:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}")
        try:
            if client.get("/readyz").status_code == 200:
                print(f"ready after {time.monotonic() - began:.1f} s", flush=True)
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server was not ready in time")


def _compress(client: httpx.Client, checkpoint: Path) -> str:
    print(f"\nPOST /compress  {checkpoint.name}, {checkpoint.stat().st_size / 1e6:.2f} MB")
    with checkpoint.open("rb") as file:
        job = _json(client.post("/compress", files={"file": file}, data={"name": "demo"}))
    began = time.monotonic()
    while job["state"] in ("queued", "running") and time.monotonic() - began < _JOB_LIMIT_S:
        time.sleep(0.2)
        job = _json(client.get(f"/jobs/{job['id']}"))
    if job["state"] != "succeeded":
        raise SystemExit(f"the job {job['state']}: {job.get('error')}")
    report = _json(client.get("/models/demo"))["report"]
    print(
        f"  {report['variant']}: {report['source_bytes'] / 1e6:.2f} MB → {report['artifact_bytes'] / 1e6:.2f} MB, "
        f"{report['ratio']:.2f} times smaller, {report['bits_per_weight']:.2f} bits a weight, "
        f"SQNR {report['sqnr_db']:.1f} dB, {report['seconds']:.1f} s",
        flush=True,
    )
    return "demo"


def _segment(client: httpx.Client, model: str, picture: Path, thing: dict[str, Any]) -> None:
    x, y = thing["point"]
    print(f"\nPOST /segment  {picture.name}, point {x},{y}")
    with picture.open("rb") as file:
        began = time.perf_counter()
        answer = _json(
            client.post(
                "/segment",
                files={"image": file},
                data={"model": model, "points": json.dumps([[x, y]]), "labels": "[1]",
                      "multimask": "true", "format": "png"},
            )
        )  # fmt: skip
        elapsed = time.perf_counter() - began
    best = max(answer["masks"], key=lambda m: m["score"])
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(best["segmentation"])))) > 127
    with Image.open(picture.with_name(thing["mask"])) as true:
        expected = np.asarray(true.convert("1"), dtype=bool)
    overlap = (mask & expected).sum() / max(1, (mask | expected).sum())
    OUT.mkdir(exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(OUT / "mask.png")
    shown = np.asarray(Image.open(picture).convert("RGB")).copy()
    shown[mask] = shown[mask] // 2 + np.array([0, 100, 127], np.uint8)
    Image.fromarray(shown).save(OUT / "overlay.png")
    print(
        f"  mask of {best['area']} pixels, predicted IoU {best['score']:.3f}, IoU with the true mask {overlap:.3f}, "
        f"{1000 * elapsed:.0f} ms\n  wrote {OUT / 'mask.png'} and {OUT / 'overlay.png'}"
    )


def _json(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        raise SystemExit(f"{response.request.url} answered {response.status_code}: {response.text}")
    found: dict[str, Any] = response.json()
    return found


if __name__ == "__main__":
    main()
