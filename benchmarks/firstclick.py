"""From a fresh process to the first mask, and what that time consists of.

``library``: a Python process that loads a compressed model and asks for one mask. ``service``: from starting the
service on a data folder that has the model to the answer of its first request. Cold runs read the packages and the
model from the disk, so far as no other process holds their pages; warm ones find them in the system's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import torch

import hypersam
from benchmarks.record import append
from benchmarks.serving import MODEL, picture, service, started

_LIBRARY = """
import json, sys, time
laps, last = {}, time.perf_counter()
def lap(name):
    global last
    now = time.perf_counter(); laps[name] = 1000 * (now - last); last = now
import torch; lap("import_torch")
import numpy as np, hypersam
from hypersam.loading import load
from hypersam.images import decode_image
lap("import_hypersam")
predictor = load(sys.argv[1]); lap("load")
image = decode_image(open(sys.argv[2], "rb").read()); lap("image")
predictor.set_image(image); lap("encode")
predictor.predict(np.array([[128, 128]]), np.array([1]), multimask_output=False); lap("decode")
print(json.dumps(laps))
"""
PARTS = ("import_torch", "import_hypersam", "ready", "load", "image", "encode", "decode")


def run(checkpoint: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of milliseconds by part, cold and warm in turn; each is appended to ``results/firstclick.csv``."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        with service(checkpoint) as served:
            for part in ("artifacts", "models"):
                shutil.copytree(served.data / part, data / part)
        for measure in (_library, _service):
            for _ in range(repeats):
                for state in ("cold", "warm"):
                    if state == "cold":
                        _forget_pages(data)
                    total, parts = measure(data)
                    found = {part: parts.get(part, 0.0) for part in PARTS}
                    row = {
                        "model": checkpoint.stem, "way": measure.__name__.strip("_"), "state": state,
                        "total_ms": total, **{f"{part}_ms": value for part, value in found.items()},
                        "other_ms": total - sum(found.values()),
                    }  # fmt: skip
                    append("firstclick", row)
                    yield row


def _library(data: Path) -> tuple[float, dict[str, float]]:
    image = data / "picture.png"
    image.write_bytes(picture(0))
    (artifact,) = (data / "artifacts").glob("*.hsam")
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _LIBRARY, str(artifact), str(image)], capture_output=True, text=True, check=True
    )
    total = 1000 * (time.perf_counter() - began)
    laps: dict[str, float] = json.loads(done.stdout)
    return total, laps


def _service(data: Path) -> tuple[float, dict[str, float]]:
    began = time.perf_counter()
    with started(data, workers="0") as (_, client):
        ready = 1000 * (time.perf_counter() - began)
        answer = client.post("/segment", files={"image": picture(0)}, data={"model": MODEL, "points": "[[128, 128]]"})
        total = 1000 * (time.perf_counter() - began)
    timings = answer.raise_for_status().json()["timings"]
    return total, {"ready": ready, **{name: timings[name] for name in ("load", "image", "encode", "decode")}}


def _forget_pages(data: Path) -> None:
    """Let the system drop the cached pages of the model and of the packages."""
    folders = [data, *(Path(package.__file__ or "").parent for package in (torch, numba, hypersam))]
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
