"""The codecs side by side on the same matrices: bits, SQNR and speed, and other projects' compressors beside them.

Bits count every byte of a tensor's stream, side information and all; the artifact's header is left out for every
method alike. ``birkhoff`` is taken without its fallback to raw storage, so that its bits are its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.record import append
from hypersam.fidelity import rtn
from kernels.codec import BirkhoffConfig, Coded, decode, encode, lattice, orbit

WORKER = Path(__file__).parent / "peer_worker.py"
Weights = Mapping[str, Tensor]


def synthetic(rows: int = 1536, columns: int = 1536, *, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Rows of three distributions, each row's scale log-normal about 0.04."""
    rng = np.random.default_rng(seed)
    draws = {
        "gauss": rng.standard_normal((rows, columns)),
        "laplace": rng.laplace(size=(rows, columns)) / math.sqrt(2),
        "student_t5": rng.standard_t(5, (rows, columns)) * math.sqrt(3 / 5),
    }
    spread = np.exp(0.3 * rng.standard_normal((rows, 1))) * 0.04
    return {name: {"w": torch.from_numpy((d * spread).astype(np.float32))} for name, d in draws.items()}


def matrices(checkpoint: Path) -> dict[str, Tensor]:
    """The matrices of a state dict with at least 32 rows and columns, tables of relative positions left out."""
    loaded = load_file(checkpoint) if checkpoint.suffix == ".safetensors" else torch.load(checkpoint, weights_only=True)
    return {
        k: v.float() for k, v in loaded.items()
        if v.ndim == 2 and min(v.shape) >= 32 and v.is_floating_point() and "rel_pos" not in k and "embeddings" not in k
    }  # fmt: skip


def run(sources: Mapping[str, Weights], peers: Path | None) -> Iterator[dict[str, Any]]:
    """A row for each source and method. ``peers``: the Python of the environment that has the other projects."""
    for source, weights in sources.items():
        rows = [*_own(weights), *_plain(weights), *(_others(weights, peers) if peers else [])]
        for row in rows:
            row = {"source": source, "weights": sum(w.numel() for w in weights.values()), **row}
            append("codecs", row)
            yield row


def _own(weights: Weights) -> Iterator[dict[str, Any]]:
    config = BirkhoffConfig(raw_above=1e9)
    published = _measured("birkhoff", weights, lambda w: encode(w, config, by_row=True))
    yield published
    relative = _step_for(weights, published["bits_per_weight"])
    same = _measured("lattice, birkhoff's bits", weights, lambda w: _lattice(w, relative))
    yield {**same, "gain_db": same["sqnr_db"] - published["sqnr_db"]}
    for bits in (6.19, 4.92, 4.0):
        relative = _step_for(weights, bits)
        yield _measured(f"lattice {bits}", weights, lambda w, r=relative: _lattice(w, r))
    for k in (3, 4, 5, 6):
        yield _measured(f"orbit k{k}", weights, lambda w, k=k: orbit.encode(w, k, columns=w.shape[1]))


def _plain(weights: Weights) -> Iterator[dict[str, Any]]:
    for bits, group in ((8, None), (6, 128), (5, 128), (4, 128)):
        began = time.perf_counter()
        made = {name: rtn(w, bits, group) for name, w in weights.items()}
        seconds = time.perf_counter() - began
        size = sum(each * weights[name].numel() for name, (_, each) in made.items())
        label = f"round to nearest int{bits}" + (f" g{group}" if group else "")
        yield _row(label, weights, {name: dense for name, (dense, _) in made.items()}, size, seconds)


def _others(weights: Weights, python: Path) -> Iterator[dict[str, Any]]:
    """Other projects, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: w.contiguous() for k, w in weights.items()}, f"{folder}/weights.safetensors")
        command = [str(python), "-W", "ignore", str(WORKER), f"{folder}/weights.safetensors", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        for line in map(json.loads, done.stdout.splitlines()):
            label = f"{line['method']} ({line['package']} {line.get('version', '')})"
            if "failed" in line:
                yield {"method": f"{label}: {line['failed']}", "bits_per_weight": math.nan, "sqnr_db": math.nan,
                       "seconds": math.nan, "million_per_s": math.nan, "gain_db": math.nan}  # fmt: skip
                continue
            dense = load_file(f"{folder}/{line['method']}.safetensors")
            size = line["bits_per_weight"] * sum(w.numel() for w in weights.values())
            yield _row(label, weights, dense, size, line["seconds"])


def _lattice(weight: Tensor, relative: float) -> Coded:
    return lattice.encode(weight, _fp32(relative * _rms(weight)), columns=weight.shape[1])


def _step_for(weights: Weights, bits: float) -> float:
    """Δ / rms, the same for all, at which the streams have that many bits a weight."""
    count = sum(w.numel() for w in weights.values())
    low, high = -8.0, 2.0
    for _ in range(24):
        middle = (low + high) / 2
        size = sum(lattice.estimate(w, _fp32(2**middle * _rms(w)), columns=w.shape[1]).bits for w in weights.values())
        low, high = (middle, high) if size > bits * count else (low, middle)
    return float(2**high)


def _measured(label: str, weights: Weights, code: Callable[[Tensor], Any]) -> dict[str, Any]:
    code(next(iter(weights.values()))[:2])  # what is compiled at the first call is not timed
    began = time.perf_counter()
    made: dict[str, Coded] = {name: code(w) for name, w in weights.items()}
    seconds = time.perf_counter() - began
    size = sum(8 * each.stream().numel() for each in made.values())
    return _row(label, weights, {name: decode(each) for name, each in made.items()}, size, seconds)


def _row(label: str, weights: Weights, dense: Weights, bits: float, seconds: float) -> dict[str, Any]:
    signal = sum(float(w.double().square().sum()) for w in weights.values())
    error = sum(float((w.double() - dense[name].double()).square().sum()) for name, w in weights.items())
    count = sum(w.numel() for w in weights.values())
    return {"method": label, "bits_per_weight": bits / count, "sqnr_db": 10 * math.log10(signal / error),
            "seconds": seconds, "million_per_s": count / seconds / 1e6, "gain_db": math.nan}  # fmt: skip


def _rms(weight: Tensor) -> float:
    return float(weight.double().square().mean().sqrt())


def _fp32(value: float) -> float:
    return float(np.float32(value))
