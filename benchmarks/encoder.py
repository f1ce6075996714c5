"""The whole image encoder on the CPU: from compressed weights, from dense ones, and other projects' in the same run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import random_sam
from benchmarks.record import append
from benchmarks.turns import Worker, compressed, cosine, interleaved, times_faster

CODECS = {"lattice": "5x", "orbit": "8x"}
OWN = (
    "own dense fp32", "own lattice fp32", "own dense bf16", "own lattice bf16", "own lattice-stream bf16",
    "own orbit bf16", "own lattice int8", "own orbit int8",
)  # fmt: skip
OFFICIAL = ("official fp32", "official bf16")
PEERS = ("torchao int8", "ort fp32", "ort int8")
LARGE = ("ort fp32", "ort int8")
"""ONNX Runtime keeps what it computed in, 7 GB each."""
SAME_ARITHMETIC = {"fp32": "own dense fp32", "bf16": "own dense bf16"}


def run(variant: str, folder: Path, peers: Path | None, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way. ``peers``: the Python of an environment with torchao, onnx and onnxruntime."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = random_sam.write(variant, folder / f"{variant}_random.pth")
    for codec, preset in CODECS.items():
        compressed(checkpoint, folder / f"{variant}_{codec}.hsam", codec, {"preset": preset})
    methods = [*OFFICIAL, *(PEERS if peers else ()), *OWN]
    workers: dict[str, Worker] = {}
    try:
        for method in methods:
            workers[method] = Worker(
                "benchmarks.encoder_worker", [method, variant, str(folder), str(threads)], threads=threads,
                python=peers if method in PEERS else None, large=method in LARGE,
            )  # fmt: skip
        took = interleaved(workers, rounds)
    finally:
        for worker in workers.values():
            worker.stop()
    exact = _saved(folder, "official fp32")
    for method in methods:
        row = {
            "variant": variant, "method": method, "threads": threads, "rounds": rounds,
            "load_average": os.getloadavg()[0], "weights_mb": workers[method].ready["weights_mb"],
            "peak_mb": max(t["peak_mb"] for t in took[method]), "cosine": cosine(_saved(folder, method), exact),
        }  # fmt: skip
        same = SAME_ARITHMETIC.get(method.split()[-1], "own dense bf16")
        for clock in ("wall", "cpu"):
            row[f"{clock}_s"] = min(t[clock] for t in took[method])
            for name, peer in (("official_fp32", "official fp32"), ("ort_int8", "ort int8"), ("own_dense", same)):
                ratio = times_faster(took.get(peer, ()), took[method], clock)
                row[f"{clock}_times_{name}"] = "" if ratio is None else ratio
        append("encoder", row)
        yield row


def _saved(folder: Path, method: str) -> Path:
    return folder / f"{method.replace(' ', '_')}.npy"
