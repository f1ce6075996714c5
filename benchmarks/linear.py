"""Compressed layers on the CPU beside the dense layer of the same arithmetic, and decoders beside torch operations.

Passes are interleaved, one of each a round; ratios are of the same round and their median is given.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import append
from kernels.codec import BirkhoffConfig, Coded, encode, lattice, orbit
from kernels.hyperlinear import HyperLinear
from kernels.hyperlinear import orbit as orbit_product

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
FORMS = ("lattice", "stream", "orbit 3", "orbit 4", "orbit 5", "orbit 6", "birkhoff")
ROUNDS = 5


def run(tokens: int, threads: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row for each shape of SAM-B, form, arithmetic and number of threads."""
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for shape in SHAPES:
                for form in FORMS:
                    for arithmetic in ("fp32", "bf16", "int8"):
                        if (form, arithmetic) == ("stream", "int8"):
                            continue
                        with torch.inference_mode():
                            row = _row(shape, form, arithmetic, tokens)
                        row = {**row, "threads": count, "load_average": os.getloadavg()[0]}
                        append("linear", row)
                        yield row
    finally:
        torch.set_num_threads(before)


def _row(shape: tuple[int, int], form: str, arithmetic: str, tokens: int) -> dict[str, Any]:
    kind = torch.float32 if arithmetic == "fp32" else torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw) * 0.03
    x = torch.randn(tokens, shape[1], generator=draw).to(kind)
    bias = torch.randn(shape[0], generator=draw).to(kind)
    layer = HyperLinear.from_encoded(_encoded(form, weight), bias, stream=form == "stream")
    layer.int8 = arithmetic == "int8"
    dense = layer.dense().to(kind)
    ways: dict[str, Callable[[], Any]] = {"compressed": lambda: layer(x), "dense": lambda: F.linear(x, dense, bias)}
    # One token: all but nothing is left beside the decoding.
    ways["one_token"] = lambda: layer(x[:1])
    if (torch_ops := _by_torch_ops(layer)) is not None:
        ways["torch_ops"] = torch_ops
    took = _interleaved(ways)
    exact = F.linear(x.float(), dense.float(), bias.float())
    got = layer(x).float()
    row: dict[str, Any] = {
        "out": shape[0], "in": shape[1], "tokens": tokens, "form": form, "arithmetic": arithmetic,
        "snr_db": float(20 * torch.log10(exact.norm() / (got - exact).norm())),
        "bits_per_weight": 8 * (layer.resident_bytes() - bias.nbytes) / weight.numel(),
    }  # fmt: skip
    for clock in ("wall", "cpu"):
        row[f"{clock}_ms"] = 1e3 * min(t[clock] for t in took["compressed"])
        pairs = zip(took["dense"], took["compressed"], strict=True)
        row[f"{clock}_times_dense"] = statistics.median(d[clock] / c[clock] for d, c in pairs)
    row["decode_m_per_cpu_s"] = weight.numel() / 1e6 / min(t["cpu"] for t in took["one_token"])
    ops = took.get("torch_ops")
    row["torch_ops_m_per_cpu_s"] = weight.numel() / 1e6 / min(t["cpu"] for t in ops) if ops else ""
    return row


def _encoded(form: str, weight: Tensor) -> Coded:
    columns = weight.shape[1]
    if form in ("lattice", "stream"):
        return lattice.encode(weight, 0.0015, columns=columns)
    if form == "birkhoff":
        made = encode(weight, BirkhoffConfig(raw_above=1e9), by_row=True)
        assert not isinstance(made, Tensor)
        return made  # type: ignore[return-value]
    return orbit.encode(weight, int(form[-1]), columns=columns, rotate=True, threads=os.cpu_count() or 1)


def _by_torch_ops(layer: HyperLinear) -> Callable[[], Tensor] | None:
    """The decoding by torch operations alone, where a compiled loop took its place."""
    held: Any = layer
    if hasattr(layer, "codes"):
        weight = orbit_product.Weight(
            held.codes, held.bits, held.table, held.scales, held.block, held.signs, held.index, held.values
        )
        return lambda: weight.rows(0, layer.out_features)
    if hasattr(layer, "pairs"):
        return lambda: held.pairs[held.indices.long()]
    if hasattr(layer, "levels"):
        return lambda: held.levels.to(torch.float32).mul_(held.step).to(torch.bfloat16)
    return None


def _interleaved(ways: dict[str, Callable[[], Any]]) -> dict[str, list[dict[str, float]]]:
    took: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, call in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:  # the first makes ready
                took[name].append({"wall": wall, "cpu": cpu})
    return took
