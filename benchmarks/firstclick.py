"""From a fresh process to the first mask, and what that time consists of.

``library``: a Python process that loads a compressed model and asks for one mask. ``service``: from starting the
service on a data folder that has the model to the answer of its first request, and to that of the second picture's.
Cold is the first run after the files were dropped from the system's cache where that is allowed, else the first run at
all; the others are warm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import append
from benchmarks.serving import MODEL, picture, service, started
from hypersam.compression import compress

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
PARTS = ("start", "import_torch", "import_hypersam", "ready", "load", "image", "encode", "decode", "other")


def run(checkpoint: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows of milliseconds by part, cold first; each is appended to ``results/firstclick.csv``."""
    rows = _library(checkpoint, repeats) + _service(checkpoint, repeats)
    for row in rows:
        append("firstclick", row)
    return rows


def _row(checkpoint: Path, kind: str, number: int, total: float, parts: dict[str, float]) -> dict[str, Any]:
    found = {part: parts.get(part, 0.0) for part in PARTS[:-1]}
    found["other"] = total - sum(found.values())
    state = "warm" if number else "cold" if _drops_caches() else "first"
    return {
        "model": checkpoint.stem, "way": kind, "state": state, "total_ms": total,
        **{f"{part}_ms": value for part, value in found.items()},
    }  # fmt: skip


def _library(checkpoint: Path, repeats: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifact, image = Path(folder) / "model.hsam", Path(folder) / "picture.png"
        compress(checkpoint, artifact, options={"fidelity": False})
        image.write_bytes(picture(0))
        for number in range(repeats):
            if not number:
                _drop_caches()
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _LIBRARY, str(artifact), str(image)], capture_output=True, text=True, check=True
            )
            total = 1000 * (time.perf_counter() - began)
            laps: dict[str, float] = json.loads(done.stdout)
            rows.append(_row(checkpoint, "library", number, total, laps | {"start": 0.0}))
    return rows


def _service(checkpoint: Path, repeats: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with service(checkpoint) as served:
            subprocess.run(["cp", "-r", f"{served.data}/artifacts", f"{served.data}/models", folder], check=True)
        for number in range(repeats):
            if not number:
                _drop_caches()
            began = time.perf_counter()
            with started(Path(folder), workers="0") as (_, client):
                ready = time.perf_counter()
                answer = client.post(
                    "/segment", files={"image": picture(number)}, data={"model": MODEL, "points": "[[128, 128]]"}
                )
                total = 1000 * (time.perf_counter() - began)
                timings = answer.raise_for_status().json()["timings"]
            parts = {name: timings[name] for name in ("load", "image", "encode", "decode")}
            rows.append(_row(checkpoint, "service", number, total, parts | {"ready": 1000 * (ready - began)}))
    return rows


def _drops_caches() -> bool:
    return os.geteuid() == 0 and os.access("/proc/sys/vm/drop_caches", os.W_OK)


def _drop_caches() -> None:
    """Make the system read files from the disk again, where this user may."""
    if _drops_caches():
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
