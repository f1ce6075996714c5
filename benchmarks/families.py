"""Every family beside its official implementation on the CPU: encoder and decoder, dense, in bf16 and compressed.

The same random weights (``benchmarks/random_sam.py``), the same picture of 1024 x 1024 pixels, through the same two
calls: ``set_image`` is the encoder's column, a click on the held embedding the decoder's. What bf16 and compression
cost in accuracy is the cosine with the official fp32 embedding, and the largest difference of the low-resolution
logits over their largest magnitude; both are of random weights, which say little of masks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import random_sam
from benchmarks.families_official import OFFICIAL
from benchmarks.record import append
from benchmarks.turns import Worker, compressed, cosine, interleaved, times_faster
from kernels.hyperlinear.cpu import native_bf16

VARIANTS = ("sam_vit_b", "sam_hq_vit_b", "sam_hq_vit_tiny", "sam2.1_hiera_tiny", "mobile_sam", "efficient_sam_ti")
"""One of each family that has an official implementation to be held against; EdgeSAM's is left alone."""
REFERENCE = "official fp32"
OWN = ("own dense fp32", "own dense bf16", "own lattice fp32", "own lattice bf16")


def run(
    variants: Sequence[str], folder: Path, oracles: Path, threads: int, rounds: int
) -> Iterator[dict[str, Any] | str]:
    """A row for each way of each variant, and a word for each variant that is left out.

    ``oracles``: the Python of an environment with the official packages (`make oracles`).
    """
    if unknown := sorted(set(variants) - set(OFFICIAL)):
        raise KeyError(f"no official implementation of {', '.join(unknown)}; known: {', '.join(OFFICIAL)}")
    folder.mkdir(parents=True, exist_ok=True)
    for variant in variants or VARIANTS:
        package = OFFICIAL[variant][0]
        if not _importable(package, oracles):
            yield f"{variant} is left out: {package} cannot be imported by {oracles}"
            continue
        yield from _measured(variant, folder, oracles, threads, rounds)


def _importable(package: str, python: Path) -> bool:
    looked = [str(python), "-W", "ignore", "-c", f"import {package}"]
    return subprocess.run(looked, capture_output=True, check=False).returncode == 0


def _measured(variant: str, folder: Path, oracles: Path, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    checkpoint = random_sam.write(variant, folder / f"{variant}_random.pth")
    # Where bits go is not what is timed here, and measuring it is a minute for the large ones.
    compressed(checkpoint, folder / f"{variant}_lattice.hsam", "lattice", {"preset": "5x", "policy": "equal_error"})
    methods = (REFERENCE, *(m for m in OWN if native_bf16() or not m.endswith("bf16")))
    workers: dict[str, Worker] = {}
    try:
        for method in methods:
            workers[method] = Worker(
                "benchmarks.families_worker", [method, variant, str(folder), str(threads)], threads=threads,
                python=oracles if method == REFERENCE else Path(sys.executable),
            )  # fmt: skip
        took = interleaved(workers, rounds)
    finally:
        for worker in workers.values():
            worker.stop()
    for method in methods:
        row: dict[str, Any] = {
            "variant": variant, "method": method, "official": workers[REFERENCE].ready["whose"], "threads": threads,
            "rounds": rounds, "load_average": os.getloadavg()[0], "weights_mb": workers[method].ready["weights_mb"],
            "peak_mb": max(t["peak_mb"] for t in took[method]),
            "embedding_cosine": cosine(*(_saved(folder, variant, m, "embedding") for m in (method, REFERENCE))),
            "logits_error": _largest(*(_saved(folder, variant, m, "logits") for m in (method, REFERENCE))),
        }  # fmt: skip
        for part in ("encoder", "decoder"):
            for clock in ("wall", "cpu"):
                figure = f"{part}_{clock}"
                row[f"{figure}_s"] = min(t[figure] for t in took[method])
                row[f"{figure}_times_official"] = times_faster(took[REFERENCE], took[method], figure)
        append("families", row)
        yield row


def _saved(folder: Path, variant: str, method: str, what: str) -> Path:
    return folder / f"{variant}_{method.replace(' ', '_')}_{what}.npy"


def _largest(got: Path, want: Path) -> float:
    """The largest difference over the largest magnitude; of logits that are clamped alike."""
    one, other = (np.load(path).astype(np.float64) for path in (got, want))
    return float(np.abs(one - other).max() / np.abs(other).max())
