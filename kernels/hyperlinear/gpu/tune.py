"""Measuring the table of paths anew on the device at hand.

Every form, dtype and number of rows goes through all candidates on layers of SAM's sizes; the one of the smallest
geometric mean becomes an entry. Paths with int8 operands are listed where they beat the others, for
products that allow them.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as File
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.codec.orbit_tables import table
from kernels.hyperlinear.gpu import linear
from kernels.hyperlinear.gpu.paths import FORMAT, FORMS, OPERANDS, Entry, Path
from kernels.hyperlinear.gpu.weight import CompressedWeight

ROWS = (16, 64, 256, 1024, 4900)
"""Rows of x that are measured: an entry serves up to its number, the last any."""
LAYERS = ((256, 256), (2048, 256), (2304, 768), (1280, 1280), (5120, 1280), (1280, 5120))
"""(out, in) of layers that SAM has: the mask decoder's, and the image encoders'."""
_FEW = 64
_DECODER = 2048 * 256

_TIMES = 4
Timer = Callable[..., float]
"""Seconds that one of some calls takes."""


def candidates(operands: str, rows: int) -> Iterator[Path]:
    """The paths that are tried for a number of rows."""
    yield Path("decode", decode=(16, 256))
    yield Path("decode", decode=(16, 512))
    yield Path("decode", decode=(32, 128))
    if operands == "float32":
        yield Path("fused", tile=(16 if rows <= _FEW else 64, 64, 32))
        return
    if rows <= _FEW:
        for block_in, stages in ((64, 3), (128, 2), (128, 4)):
            yield Path("fused", tile=(16, 64, block_in), stages=stages)
            yield Path("int8", tile=(16, 64, block_in), stages=stages)
        return
    yield Path("fused", tile=(64, 64, 64), stages=3)
    yield Path("fused", tile=(128, 64, 64), stages=3)
    yield Path("fused", tile=(128, 128, 64), warps=8, stages=3)
    for tile, warps, stages in (
        ((64, 64, 128), 4, 4), ((128, 128, 64), 8, 4), ((128, 128, 128), 8, 3), ((128, 128, 128), 8, 4),
        ((128, 256, 128), 8, 3), ((256, 128, 128), 8, 3),
    ):  # fmt: skip
        yield Path("int8", tile=tile, warps=warps, stages=stages)
        yield Path("int8_decode", tile=tile, decode=(16, 256), warps=warps, stages=stages)


def random_weight(form: str, out_features: int, in_features: int, device: torch.device | str) -> CompressedWeight:
    """A weight of random codes, spread as a trained layer's: rms about 0.7/√in. Orbits are rotated if they can be."""
    rms = 0.7 / math.sqrt(in_features)
    shape = (out_features, in_features)
    if form == "birkhoff":
        pairs = (torch.randn(1225 * 4, 2, device=device) * rms).view(torch.int64).view(-1)
        indices = torch.randint(0, 1225 * 4, (out_features, (in_features + 1) // 2), dtype=torch.int16, device=device)
        return CompressedWeight.birkhoff(indices, pairs, in_features)
    index = torch.empty(0, dtype=torch.int64, device=device)
    values = torch.empty(0, dtype=torch.int32, device=device)
    if form == "lattice":
        levels = (torch.randn(shape, device=device) * 20).round_().clamp_(-127, 127).to(torch.int8)
        return CompressedWeight.lattice(levels, rms / 20, index, values)
    bits = int(form.removeprefix("orbit"))
    codes = torch.randint(0, 256, (out_features, (in_features * bits + 7) // 8), dtype=torch.uint8, device=device)
    levels = torch.from_numpy(table(bits, 0).levels.copy()).to(device)
    spread = float(levels.to(torch.float32).square().mean().sqrt())
    scales = torch.full((out_features,), rms / spread, device=device)
    block = min(in_features & -in_features, 128)
    signs = (torch.randint(0, 2, (in_features,), device=device) * 2 - 1).to(torch.int8)
    return CompressedWeight.orbit(
        codes, bits, levels, scales.view(torch.int32), block if block >= 4 else 1, signs, index, values
    )


def device_seconds(*calls: Callable[[], Tensor], replays: int = 11) -> float:
    """Median time of a call on the GPU: all are captured into one CUDA graph, so that no launch is waited for.

    Give several that work on different memory where one's would stay in the L2 cache.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000 / len(calls))
    return float(statistics.median(times[1:]))


def wall_seconds(*calls: Callable[[], Tensor]) -> float:
    """Mean time of a call by the clock: for trying out the procedure where there is no GPU."""
    began = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began) / len(calls)


def measure(
    device: torch.device, *, forms: Sequence[str] = FORMS, rows: Sequence[int] = ROWS,
    layers: Sequence[tuple[int, int]] = LAYERS, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    tell: Callable[[str], None] = lambda text: None,
) -> list[Entry]:  # fmt: skip
    """Entries for ``device``, the best first. ``tell`` hears of each. A candidate that does not fit is passed over."""
    timer: Timer = device_seconds if device.type == "cuda" else wall_seconds
    found: list[Entry] = []
    for form in forms:
        for dtype in dtypes:
            for number, count in enumerate(rows):
                # Many rows meet the encoder's layers, few the decoder's.
                sizes = [size for size in layers if (math.prod(size) <= _DECODER) == (count <= _FEW)] or list(layers)
                weights = [random_weight(form, *size, device) for size in sizes]
                scores = _scores(weights, count, dtype, device, timer)
                if not scores:
                    raise RuntimeError(f"no path of {form} ran on {device} with {count} rows of {dtype}")
                plain = min((path for path in scores if not path.int8), key=scores.__getitem__)
                best = min(scores, key=scores.__getitem__)
                bound = None if number == len(rows) - 1 else count
                for path in dict.fromkeys((best, plain)):
                    found.append(Entry((form,), (OPERANDS[dtype],), bound, None, path, measured=True))
                where = f"{best.way} {best.tile or best.decode}"
                tell(f"{form}, {dtype}, {count} rows: {where}, {1e6 * scores[best]:.1f} µs")
    return found


def _scores(
    weights: Sequence[CompressedWeight], rows: int, dtype: torch.dtype, device: torch.device, timer: Timer
) -> dict[Path, float]:
    """Geometric mean of the times over the weights, in seconds, of each candidate that runs."""
    scores = {}
    inputs = [torch.randn(rows, weight.columns, device=device).to(dtype) for weight in weights]
    for path in candidates(OPERANDS[dtype], rows):
        if path.way == "int8_decode" and weights[0].name == "lattice":
            continue  # there is nothing to decode
        try:
            times = [
                timer(*[functools.partial(linear, x, w, None, path=path)] * (_TIMES if device.type == "cuda" else 1))
                for x, w in zip(inputs, weights, strict=True)
            ]
        except triton.runtime.errors.OutOfResources:
            continue
        scores[path] = math.exp(sum(map(math.log, times)) / len(times))
    return scores


def write(file: File, device_name: str, entries: Sequence[Entry]) -> None:
    """Put the entries into the table ``file``, in the place of what it has of that device; whole or not at all."""
    document: dict[str, Any] = {"format": FORMAT, "devices": {}}
    if file.is_file():
        document = json.loads(file.read_text("utf-8"))
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    note = f"Measured on {device_name}, {today}, torch {torch.__version__}, triton {triton.__version__}."
    document["devices"][device_name] = {"note": note, "entries": [entry.as_dict() for entry in entries]}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    part.replace(file)
