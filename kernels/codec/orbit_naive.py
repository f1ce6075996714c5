"""The codec ``orbit`` in plain loops, as it is written down: the oracle for ``orbit``, with equal codes and scales.

Slow on purpose: every state is compared with every predecessor, one weight at a time, in Python's own integers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.codec.hadamard import norm, splitmix64
from kernels.codec.orbit import half_scales, outliers_of
from kernels.codec.orbit_format import OrbitTensor, row_bytes
from kernels.codec.orbit_rows import Plan
from kernels.codec.orbit_tables import table
from kernels.codec.trellis_numba import FRACTION, LIMIT


def encode(weight: Tensor, k: int, plan: Plan, *, columns: int) -> OrbitTensor:
    """Code a tensor by a given plan; see ``kernels.codec.orbit.encode_planned``, which gives the same."""
    matrix = weight.detach().to(torch.float32).reshape(-1, columns).numpy()
    _, exponent = math.frexp(float(np.abs(matrix).max()))
    exponent = min(max(exponent - 1, -126), 126)
    scaled = matrix * np.float32(2.0**-exponent)
    rows = [_encode_row(row, k, plan) for row in scaled]
    unit, scales = half_scales(np.array([scale for _, scale, _ in rows]), exponent)

    positions, missing = [], []
    for index, (symbols, _, apart) in enumerate(rows):
        levels = _levels(symbols, k, plan.law)
        for column in apart:
            decoded = _saturated(math.ldexp(float(scales[index]) * levels[column], unit))
            positions.append(index * columns + column)
            missing.append(float(matrix[index, column]) - decoded)
    return OrbitTensor(
        shape=tuple(weight.shape), dtype=weight.dtype, columns=columns, k=k, law=plan.law, block=plan.block,
        seed=plan.seed, exponent=unit, scales=torch.from_numpy(scales),
        codes=torch.from_numpy(np.stack([_pack(symbols, k) for symbols, _, _ in rows])),
        outliers=outliers_of(np.array(positions, np.int64), np.array(missing, np.float64)),
    )  # fmt: skip


def decode(encoded: OrbitTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Decode a tensor; see ``kernels.codec.orbit.decode``, which gives the same."""
    e = encoded
    dense = np.empty((e.rows, e.columns), np.float32)
    for row in range(e.rows):
        symbols = _unpack(e.codes[row].numpy(), e.k, e.columns)
        scale = np.float32(e.scales[row].item())
        plain = np.array([scale * np.float32(level) for level in _levels(symbols, e.k, e.law)], np.float32)
        if e.block > 1:
            plain = _butterflies(plain, e.block) * norm(e.block) * _signs(e.columns, e.seed)
        dense[row] = [_saturated(math.ldexp(float(value), e.exponent)) for value in plain]
    flat = dense.reshape(-1)
    for position, value in zip(e.outliers.positions.tolist(), e.outliers.values.tolist(), strict=True):
        added = _saturated(math.ldexp(value, e.outliers.exponent))
        flat[position] = _saturated(float(flat[position]) + added)
    target = dtype or e.dtype
    limit = torch.finfo(target).max
    return torch.from_numpy(dense).to(torch.float64).clamp(-limit, limit).to(torch.float32).to(target).reshape(e.shape)


def _saturated(value: float) -> float:
    limit = float(np.finfo(np.float32).max)
    return float(np.float32(min(max(value, -limit), limit)))


def _encode_row(row: NDArray[np.float32], k: int, plan: Plan) -> tuple[list[int], float, list[int]]:
    """The symbols of a row, its scale before rounding, and the columns that are kept apart."""
    columns = len(row)
    tables = table(k, plan.law)
    if plan.block > 1:
        row = _butterflies(row * _signs(columns, plan.seed), plan.block) * norm(plan.block)
    spread = _rms(row)
    apart: list[int] = []
    if plan.threshold < math.inf:
        apart = [column for column in range(columns) if float(abs(row[column])) > plan.threshold * spread]
        row = row.copy()
        row[apart] = 0
        spread = _rms(row)
    begin = spread * tables.start / (1 << FRACTION)
    if begin == 0:
        return [0] * columns, 0.0, apart
    up = 1.0 / begin
    whole = [round(float(value) * up) for value in row]
    symbols = _viterbi([min(max(value, -LIMIT), LIMIT) for value in whole], k, tables.levels)
    levels = _levels(symbols, k, plan.law)
    cross = sum(value * level for value, level in zip(whole, levels, strict=True))
    power = sum(level * level for level in levels)
    return symbols, max(cross, 0) / max(power, 1) * begin, apart


def _viterbi(x: list[int], k: int, levels: NDArray[np.int8]) -> list[int]:
    """The symbols whose levels lie nearest to ``x`` (FRACTION binary places), the lowest predecessor on ties."""
    symbols = range(1 << k)

    def step(value: int, p: int, b: int) -> int:
        level = int(levels[(p << k) | b])
        return (level * level << FRACTION) - 2 * value * level

    cost = [step(x[0], 0, b) for b in symbols]
    back: list[list[int]] = []
    for value in x[1:]:
        chosen, new = [], []
        for b in symbols:
            paths = [cost[p] + step(value, p, b) for p in symbols]
            least = min(paths)
            chosen.append(paths.index(least))
            new.append(least)
        back.append(chosen)
        cost = new
    found = [cost.index(min(cost))]
    for chosen in reversed(back):
        found.append(chosen[found[-1]])
    return found[::-1]


def _rms(row: NDArray[np.float32]) -> float:
    """Root mean square of 15-bit integers, the largest just under 2^15."""
    _, exponent = math.frexp(float(np.abs(row).max()))
    up = math.ldexp(1.0, 15 - exponent)
    total = sum(round(float(value) * up) ** 2 for value in row)
    return math.sqrt(float(total) / len(row)) / up


def _levels(symbols: list[int], k: int, law: int) -> list[int]:
    levels = table(k, law).levels
    return [int(levels[(p << k) | b]) for p, b in zip([0, *symbols], symbols, strict=False)]


def _pack(symbols: list[int], k: int) -> NDArray[np.uint8]:
    digits = "".join(format(symbol, f"0{k}b") for symbol in symbols)
    width = row_bytes(len(symbols), k)
    return np.frombuffer(int(digits.ljust(8 * width, "0"), 2).to_bytes(width, "big"), np.uint8)


def _unpack(row: NDArray[np.uint8], k: int, columns: int) -> list[int]:
    digits = "".join(format(byte, "08b") for byte in row.tolist())
    return [int(digits[k * column : k * column + k], 2) for column in range(columns)]


def _signs(columns: int, seed: int) -> NDArray[np.float32]:
    bits = [splitmix64(seed, column // 64) >> column % 64 & 1 for column in range(columns)]
    return np.array([-1.0 if bit else 1.0 for bit in bits], np.float32)


def _butterflies(row: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    row = row.copy()
    stride = 1
    while stride < block:
        for column in range(len(row)):
            if not column & stride:
                upper, lower = row[column], row[column + stride]
                row[column], row[column + stride] = upper + lower, upper - lower
        stride *= 2
    return row
