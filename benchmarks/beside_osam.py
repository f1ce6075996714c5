"""The service beside osam's own (https://github.com/wkentaro/osam): the same requests to ``POST /api/generate``.

Both serve EfficientSAM-Ti with the same random weights, osam as fp32 ONNX files for onnxruntime, this service
compressed; both are asked in turn, in the same run. Masks of random weights mean nothing, so answers are only counted.

- ``new picture``: each request has a picture that was never sent before
- ``same picture``: the same one again and again. osam keeps no embeddings and encodes it anew
- ``same picture, embedding sent``: osam's own way to save that, the embedding of an earlier answer in place of the
  picture. This service takes none: its row is the same picture again, sent in full
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import random_sam
from benchmarks.clients import Driven, drive, post
from benchmarks.record import append
from benchmarks.serving import MODEL, picture, service
from hypersam.demo import free_port

VARIANT = "efficient_sam_ti"
OSAMS = "efficientsam:10m"
ROUNDS = 3
SIDE = 512
"""Pixels of the pictures sent; both models scale them to their own 1024."""
PROMPT = {"points": [[SIDE / 2, SIDE / 2]], "point_labels": [1]}


def run(python: Path, folder: Path, new_pictures: int, again: int) -> Iterator[dict[str, Any]]:
    """Rows of figures, appended to ``results/osam.csv``; ``again``: requests on one picture, at each number of
    clients."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = random_sam.write(VARIANT, folder / f"{VARIANT}_random.pth")
    with service(checkpoint) as ours, _osam(python, checkpoint, folder) as theirs:
        urls = {"hypersam": ours.url, "osam": theirs[0]}
        pids = {"hypersam": ours.pid, "osam": theirs[1]}
        models = {"hypersam": MODEL, "osam": OSAMS}
        pixels = base64.b64encode(picture(1, SIDE)).decode()
        first = {server: _generate(models[server], image=pixels) for server in urls}
        told = _count(urls["osam"], 1, 1, lambda: first["osam"]).answers[0]
        embedding = json.loads(told)["image_embedding"]
        second = {"hypersam": first["hypersam"], "osam": _generate(OSAMS, image_embedding=embedding)}
        kinds: list[tuple[str, int, int, Callable[[str], Callable[[], bytes]]]] = []
        for clients in (1, 8):
            kinds += [
                ("new picture", clients, new_pictures, lambda server: _new(models[server])),
                ("same picture", clients, again, lambda server: lambda: first[server]),
                ("same picture, embedding sent", clients, again, lambda server: lambda: second[server]),
            ]
        for kind, clients, count, requests in kinds:
            found = {server: Driven() for server in urls}
            for _ in range(ROUNDS):
                for server, url in urls.items():
                    found[server].add(_count(url, clients, -(-count // ROUNDS), requests(server)))
            for server, driven in found.items():
                resident = psutil.Process(pids[server]).memory_info().rss / 1e6
                row = {"model": VARIANT, "kind": kind, "clients": clients, "server": server, **driven.row(),
                       "rss_mb": resident}  # fmt: skip
                append("osam", row)
                yield row


def _count(url: str, clients: int, count: int, request: Callable[[], bytes]) -> Driven:
    left = [request() for _ in range(count)]
    return drive(url, clients, lambda _: left.pop() if left else None)


def _generate(model: str, **given: Any) -> bytes:
    return post("/api/generate", {"model": model, "prompt": PROMPT, **given})


def _new(model: str) -> Callable[[], bytes]:
    def request() -> bytes:
        pixels = picture(time.time_ns() % 1_000_000_000, SIDE)
        return _generate(model, image=base64.b64encode(pixels).decode())

    return request


@contextlib.contextmanager
def _osam(python: Path, checkpoint: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Osam's server, once it answers: where it is, and its process."""
    encoder, decoder = folder / f"{VARIANT}_encoder.onnx", folder / f"{VARIANT}_decoder.onnx"
    if not decoder.exists():
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
        export = [sys.executable, "-m", "benchmarks.osam_export", checkpoint, encoder, decoder, packages]
        subprocess.run(export, check=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    worker = Path(__file__).with_name("osam_worker.py")
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home}
        (Path(home) / ".cache" / "osam").mkdir(parents=True)
        server = subprocess.Popen([python, "-P", worker, encoder, decoder, str(port)], env=environment)
        try:
            _wait(url, server)
            yield url, server.pid
        finally:
            server.terminate()
            server.wait(60)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("osam's server did not start")
