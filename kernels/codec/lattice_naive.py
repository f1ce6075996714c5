"""``lattice`` as it is written down: one weight at a time, in Python's integers. The oracle of the fast one.

Slow: meant for tensors of some thousands of weights. Only the frequencies are read from the shipped tables.
"""

from __future__ import annotations

import functools
import math
import struct

import numpy as np
import torch
from torch import Tensor

from kernels.codec import lattice, lattice_tables
from kernels.codec.lattice_format import LatticeTensor
from kernels.codec.lattice_tables import HIGHEST, LARGEST, LOWEST, ZERO_ROW

Symbol = int | None
"""A level, or None for an escape."""

_F32 = np.float32


def encode(weight: Tensor, step: float, *, columns: int, offset: float = 0.0, beta: int | None = None) -> LatticeTensor:
    """Code a tensor; see ``kernels.codec.lattice.encode``, which gives the same."""
    delta, base = _F32(step), _F32(offset)
    if beta is None:
        beta = cheapest(lattice.sample(weight, columns, 1 << 16, 256), delta, base, weight.dtype)
    rows = [list(row) for row in weight.detach().cpu().float().reshape(-1, columns).numpy()]
    largest = min(torch.finfo(weight.dtype).max, torch.finfo(torch.float32).max)
    classes: list[int] = []
    symbols: list[list[Symbol]] = []
    escapes: list[float] = []
    for row in rows:
        raw = [level(w, delta, base, largest) for w in row]
        j = row_class(row, raw, delta, base, beta)
        coded = [q if q is not None and frequency(beta, j, q) else None for q in raw] if j != ZERO_ROW else raw
        classes.append(j)
        symbols.append(coded)
        escapes += [float(w) for w, q in zip(row, coded, strict=True) if q is None]
    lanes, rows_each = _lanes(len(rows) * columns), max(1, 65536 // columns)
    counts, states, words = b"", b"", b""
    for first in range(0, len(rows), rows_each):
        last = first + rows_each
        final, emitted = encode_segment(symbols[first:last], classes[first:last], beta, lanes)
        counts += struct.pack("<I", len(emitted))
        states += struct.pack(f"<{lanes}I", *final)
        words += struct.pack(f"<{len(emitted)}H", *emitted)
    stream = struct.pack(f"<{len(rows)}b", *classes) + counts + states + words
    stream += struct.pack(f"<{len(escapes)}f", *escapes)
    data = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    return LatticeTensor(tuple(weight.shape), weight.dtype, columns, float(delta), float(base), beta, data)


def decode(encoded: LatticeTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Decode a tensor; see ``kernels.codec.lattice.decode``, which gives the same."""
    stream = encoded.stream().numpy().tobytes()
    columns, rows = encoded.columns, math.prod(encoded.shape) // encoded.columns
    lanes, rows_each = _lanes(rows * columns), max(1, 65536 // columns)
    segments = -(-rows // rows_each)
    classes = struct.unpack_from(f"<{rows}b", stream)
    counts = struct.unpack_from(f"<{segments}I", stream, rows)
    states = struct.unpack_from(f"<{segments * lanes}I", stream, rows + 4 * segments)
    at = rows + 4 * segments * (1 + lanes)
    symbols: list[Symbol] = []
    for number, count in enumerate(counts):
        words = list(struct.unpack_from(f"<{count}H", stream, at))
        at += 2 * count
        of_rows = classes[number * rows_each : (number + 1) * rows_each]
        state = list(states[number * lanes : (number + 1) * lanes])
        symbols += decode_segment(of_rows, columns, state, words, encoded.beta)
    escapes = list(struct.unpack_from(f"<{(len(stream) - at) // 4}f", stream, at))
    if len(escapes) != symbols.count(None):
        raise ValueError("the number of escapes is not that of their values")
    delta, base = _F32(encoded.step), _F32(encoded.offset)
    values = [_F32(escapes.pop(0)) if q is None else base + delta * _F32(q) for q in symbols]
    return torch.tensor(np.array(values, dtype=np.float32)).view(encoded.shape).to(dtype or encoded.dtype)


def level(weight: np.float32, delta: np.float32, base: np.float32, largest: float) -> Symbol:
    """rint((w − offset)/Δ), every operation in fp32; None where it is over 126, or its weight beyond the dtype."""
    with np.errstate(over="ignore", under="ignore"):
        q = np.rint((weight - base) / delta)
        if abs(q) > LARGEST or abs(base + delta * q) > largest:
            return None
    return int(q)


def row_class(row: list[np.float32], raw: list[Symbol], delta: np.float32, base: np.float32, beta: int) -> int:
    """round(8·log2(rms/Δ)) of the weights that have a level, or of all weights where the row is cheaper so."""
    if all(q == 0 for q in raw):
        return ZERO_ROW
    with np.errstate(over="ignore"):
        all_of_them = [(column % 16, w - base) for column, w in enumerate(row)]
    fitting = [pair for pair, q in zip(all_of_them, raw, strict=True) if q is not None]
    a, b = (_nearest_class(pairs, delta) for pairs in (fitting, all_of_them))
    if len(fitting) == len(raw):
        return a
    return a if cost(beta, a, raw) <= cost(beta, b, raw) else b


def _nearest_class(pairs: list[tuple[int, np.float32]], delta: np.float32) -> int:
    """The class of weights v given as (lane, v): squares in float64, summed by lane, then over the lanes."""
    if not pairs:
        return LOWEST
    sums = [0.0] * 16
    for lane, v in pairs:
        sums[lane] += float(v) * float(v)
    energy = 0.0
    for each in sums:
        energy += each
    if energy == 0 or math.isinf(energy):
        return LOWEST if energy == 0 else HIGHEST
    mantissa, exponent = math.frexp(energy / (len(pairs) * (float(delta) * float(delta))))
    bounds = [2.0 ** ((2 * i + 1) / 8) for i in range(4)]
    j: int = 4 * (exponent - 1) + sum(2 * mantissa >= bound for bound in bounds)
    return min(max(j, LOWEST), HIGHEST)


@functools.cache
def frequency(beta: int, j: int, q: Symbol) -> int:
    """Slots of the 4096 that a symbol has in the table of β and class j; 0 where it has none."""
    return int(lattice_tables.table(beta).frequency[j - LOWEST, 0 if q is None else q + 128])


@functools.cache
def start(beta: int, j: int, q: Symbol) -> int:
    """The first slot of a symbol: the escape's come first, then those of the levels, ascending."""
    return 0 if q is None else frequency(beta, j, None) + sum(frequency(beta, j, p) for p in range(-LARGEST, q))


def cost(beta: int, j: int, symbols: list[Symbol]) -> int:
    """What symbols cost in units of 2^−16 bit, each rounded; an escape 32 bits more."""
    return sum(_symbol_cost(beta, j, q) for q in symbols)


@functools.cache
def _symbol_cost(beta: int, j: int, q: Symbol) -> int:
    f = frequency(beta, j, q)
    coded = round((12 - math.log2(f or frequency(beta, j, None))) * 65536)
    return coded + (0 if f and q is not None else 32 * 65536)


def cheapest(sample: np.ndarray, delta: np.float32, base: np.float32, dtype: torch.dtype) -> int:
    """The shape that costs the least on a sample, the first of equals; classes as β = 1 has them."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    totals = [0] * len(lattice_tables.BETAS)
    for row in sample:
        raw = [level(w, delta, base, largest) for w in row]
        j = row_class(list(row), raw, delta, base, 3)
        if j != ZERO_ROW:
            totals = [total + cost(beta, j, raw) for beta, total in enumerate(totals)]
    return totals.index(min(totals))


def encode_segment(
    symbols: list[list[Symbol]], classes: list[int], beta: int, lanes: int
) -> tuple[list[int], list[int]]:
    """The states that a decoder starts with, and the words in the order it reads them."""
    states = [1 << 16] * lanes
    emitted: list[int] = []
    for row, j in zip(reversed(symbols), reversed(classes), strict=True):
        if j == ZERO_ROW:
            continue
        for column in range(len(row) - 1, -1, -1):
            f, lane = frequency(beta, j, row[column]), column % lanes
            x = states[lane]
            if x >= f << 20:
                emitted.append(x & 0xFFFF)
                x >>= 16
            states[lane] = (x // f << 12) + x % f + start(beta, j, row[column])
    return states, emitted[::-1]


def decode_segment(
    classes: tuple[int, ...], columns: int, states: list[int], words: list[int], beta: int
) -> list[Symbol]:
    """The symbols of a segment, row by row. Raises ValueError where words are missing, left over, or damaged."""
    found: list[Symbol] = []
    read = 0
    for j in classes:
        if j == ZERO_ROW:
            found += [0] * columns
            continue
        largest = int(lattice_tables.table(beta).limit[j - LOWEST])
        order: list[Symbol] = [None, *range(-largest, largest + 1)]
        by_slot = [q for q in order for _ in range(frequency(beta, j, q))]
        starts = {q: start(beta, j, q) for q in order}
        for column in range(columns):
            lane = column % len(states)
            x = states[lane]
            q = by_slot[x & 4095]
            x = frequency(beta, j, q) * (x >> 12) + (x & 4095) - starts[q]
            if x < 1 << 16:
                if read == len(words):
                    raise ValueError("a segment has too few words")
                x = x << 16 | words[read]
                read += 1
            states[lane] = x
            found.append(q)
    if read != len(words) or any(x != 1 << 16 for x in states):
        raise ValueError("a segment's words do not end where its weights do")
    return found


def _lanes(count: int) -> int:
    return 16 if count >= 1 << 14 else 1
