"""The whole image encoder on the CPU: from compressed weights, from dense ones, and other projects' in the same run.

Each way is a process of its own that waits for its turn, so that memory is its own and passes are interleaved: one of
each a round. Ratios are of the same round, their median is given; seconds are the least of all rounds. On a machine
that others use the processor's time tells more than the clock's, so both are recorded.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import random_sam
from benchmarks.record import append

CODECS = {"lattice": "5x", "orbit": "8x"}
OWN = (
    "own dense fp32", "own lattice fp32", "own dense bf16", "own lattice bf16", "own lattice-stream bf16",
    "own orbit bf16", "own lattice int8", "own orbit int8",
)  # fmt: skip
OFFICIAL = ("official fp32", "official bf16")
PEERS = ("torchao int8", "ort fp32", "ort int8")
SAME_ARITHMETIC = {"fp32": "own dense fp32", "bf16": "own dense bf16"}


def run(variant: str, folder: Path, peers: Path | None, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way. ``peers``: the Python of an environment with torchao, onnx and onnxruntime."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = random_sam.write(variant, folder / f"{variant}_random.pth")
    for codec, preset in CODECS.items():
        _compressed(checkpoint, folder / f"{variant}_{codec}.hsam", codec, preset)
    methods = [*OFFICIAL, *(PEERS if peers else ()), *OWN]
    workers: dict[str, subprocess.Popen[str]] = {}
    try:
        held, took = {}, {}
        for method in methods:
            workers[method] = _start(method, variant, folder, threads, peers if method in PEERS else None)
            held[method] = _answer(workers[method])["weights_mb"]
            took[method] = []
        for _ in range(rounds):
            for method in methods:
                took[method].append(_pass(workers[method]))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    exact = _embedding(folder, "official fp32")
    for method in methods:
        row = {
            "variant": variant, "method": method, "threads": threads, "rounds": rounds,
            "load_average": os.getloadavg()[0], "weights_mb": held[method],
            "peak_mb": max(t["peak_mb"] for t in took[method]), "cosine": _cosine(_embedding(folder, method), exact),
        }  # fmt: skip
        same = SAME_ARITHMETIC.get(method.split()[-1], "own dense bf16")
        for clock in ("wall", "cpu"):
            row[f"{clock}_s"] = min(t[clock] for t in took[method])
            for name, peer in (("official_fp32", "official fp32"), ("ort_int8", "ort int8"), ("own_dense", same)):
                ratios = [a[clock] / b[clock] for a, b in zip(took.get(peer, ()), took[method], strict=False)]
                row[f"{clock}_times_{name}"] = statistics.median(ratios) if ratios else ""
        append("encoder", row)
        yield row


def _compressed(checkpoint: Path, artifact: Path, codec: str, preset: str) -> None:
    if artifact.exists():
        return
    # In a process of its own, so that this one stays small beside those that are measured.
    code = (
        "import sys, hypersam\n"
        "hypersam.compress(*sys.argv[1:3], codec=sys.argv[3], options={'preset': sys.argv[4], 'fidelity': False})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint), str(artifact), codec, preset], check=True)


def _start(method: str, variant: str, folder: Path, threads: int, python: Path | None) -> subprocess.Popen[str]:
    here = Path(__file__).parent.parent
    environment = {
        **os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    command = [str(python or sys.executable), "-m", "benchmarks.encoder_worker", method, variant, str(folder)]
    return subprocess.Popen(
        [*command, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here, env=environment
    )


def _pass(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return _answer(worker)


def _answer(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("answer "):
            answer: dict[str, float] = json.loads(line.removeprefix("answer "))
            return answer
    raise SystemExit(f"{worker.args} ended without an answer")


def _embedding(folder: Path, method: str) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.load(folder / f"{method.replace(' ', '_')}.npy")
    return found.astype(np.float64).ravel()


def _cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
