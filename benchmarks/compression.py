"""Compress a checkpoint of a published size (random weights) or any given one; compare the embeddings."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append
from hypersam.loading import load
from hypersam.scenes import make_scene


def run(name: str, checkpoint: Path, folder: Path, codec: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one checkpoint; the compression runs in a process of its own, for its peak memory."""
    artifact = folder / f"{name}.hsam"
    code = (
        "import sys, json, resource, hypersam\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "options = json.loads(sys.argv[4])\n"
        "report = hypersam.compress(sys.argv[1], sys.argv[2], codec=sys.argv[3], options=options)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "keep = ('ratio', 'fp32_ratio', 'bits_per_weight', 'sqnr_db', 'seconds', 'source_bytes', 'artifact_bytes')\n"
        "print(json.dumps({k: getattr(report, k) for k in keep} | {'peak_mb': peak / 1024}))\n"
    )
    arguments = [str(checkpoint), str(artifact), codec, json.dumps(dict(options))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = {
        "model": name,
        "codec": codec,
        "options": json.dumps(dict(options)),
        **json.loads(done.stdout),
    }
    picture = make_scene(1, size=1024).image
    embeddings = {}
    for kind, path in (("original", checkpoint), ("compressed", artifact)):
        began = time.perf_counter()
        predictor = load(path)
        row[f"load_{kind}_s"] = time.perf_counter() - began
        row[f"resident_{kind}_mb"] = predictor.model.resident_bytes() / 1e6
        predictor.set_image(picture)  # the first call prepares the threads and the allocator
        began = time.perf_counter()
        predictor.set_image(picture)
        row[f"encode_{kind}_s"] = time.perf_counter() - began
        embeddings[kind] = predictor.get_image_embedding().double().flatten()
        del predictor
    a, b = embeddings["original"], embeddings["compressed"]
    row["embedding_cosine"] = float(torch.dot(a, b) / (a.norm() * b.norm()))
    row["process_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    append("compression", row)
    return row
