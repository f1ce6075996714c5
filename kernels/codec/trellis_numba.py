"""The compiled loops of ``orbit``: the Viterbi search, and reading and writing the digits.

Rows lie side by side as lanes, (columns, lanes): every loop over lanes is one the compiler turns into vector
instructions. All decisions are made in integers, so codes are equal on every machine and in any order of summation;
what floating arithmetic there is (float64) rounds once an operation and has no sum of products.

The cost of a path ends in T² − 2·x·T of its last state σ = (p, b), p the previous symbol: it depends on σ alone, so the
2^k best paths that end in each b are all that must be kept. Costs hold the predecessor p in their k lowest bits,
so that one minimum finds both, the lower p on ties.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

FRACTION = 6
"""Binary places of a weight in units of levels, and of a path's cost."""
LIMIT = 255 << FRACTION
"""Weights beyond ±255 levels cost as if they were there; keeps costs of k = 6 within int32."""
SPAN = 8192
"""Columns whose decisions are kept at once; longer rows are searched twice, from saved costs."""

Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]


@njit(cache=True, nogil=True, fastmath=False)
def load(weight: NDArray[np.float32], first: int, scale: np.float32, out: NDArray[np.float32]) -> None:
    """``out`` (columns, lanes) = rows from ``first`` on of ``weight``, fp32 (rows, columns), times ``scale``, 2^e.

    Sixteen columns of a row at a time, so that reading and writing both stay in the cache.
    """
    columns, lanes = out.shape
    for start in range(0, columns, 16):
        for lane in range(lanes):
            for column in range(start, min(start + 16, columns)):
                out[column, lane] = weight[first + lane, column] * scale


@njit(cache=True, nogil=True, fastmath=False)
def rotate(x: NDArray[np.float32], signs: NDArray[np.float32], block: int, norm: np.float32) -> None:
    """Rotate each lane of ``x`` (columns, lanes) in place: signs, butterflies of blocks, times 1/√block."""
    columns, lanes = x.shape
    for start in range(0, columns, block):
        for column in range(start, start + block):
            sign = signs[column]
            for lane in range(lanes):
                x[column, lane] *= sign
        stride = 1
        while stride < block:
            for group in range(start, start + block, 2 * stride):
                for column in range(group, group + stride):
                    upper = x[column]
                    lower = x[column + stride]
                    for lane in range(lanes):
                        a = upper[lane]
                        b = lower[lane]
                        upper[lane] = a + b
                        lower[lane] = a - b
            stride *= 2
        for column in range(start, start + block):
            for lane in range(lanes):
                x[column, lane] *= norm


@njit(cache=True, nogil=True, fastmath=False)
def rms(x: NDArray[np.float32], out: NDArray[np.float64]) -> None:
    """``out`` (lanes,) = root mean square of each lane: of integers of 15 bits, the lane's largest just under 2^15.

    Integers make it independent of the order of summation.
    """
    columns, lanes = x.shape
    largest = np.zeros(lanes, np.float32)
    for column in range(columns):
        for lane in range(lanes):
            largest[lane] = max(largest[lane], abs(x[column, lane]))
    up = np.empty(lanes, np.float64)
    for lane in range(lanes):
        _, exponent = math.frexp(np.float64(largest[lane]))
        up[lane] = math.ldexp(1.0, 15 - exponent)
    total = np.zeros(lanes, np.int64)
    for column in range(columns):
        for lane in range(lanes):
            q = np.int32(np.rint(np.float64(x[column, lane]) * up[lane]))
            total[lane] += np.int64(q) * np.int64(q)
    for lane in range(lanes):
        out[lane] = np.sqrt(np.float64(total[lane]) / columns) / up[lane]


@njit(cache=True, nogil=True, fastmath=False)
def clear_outliers(x: NDArray[np.float32], threshold: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
    """Zero what lies beyond each lane's threshold; ``counts`` (lanes,) = how many."""
    columns, lanes = x.shape
    counts[:] = 0
    for column in range(columns):
        for lane in range(lanes):
            if np.float64(abs(x[column, lane])) > threshold[lane]:
                x[column, lane] = 0
                counts[lane] += 1


@njit(cache=True, nogil=True, fastmath=False)
def quantise(x: NDArray[np.float32], up: NDArray[np.float64], out: Ints) -> None:
    """``out`` (columns, lanes) = rint(x·up) of each lane."""
    columns, lanes = x.shape
    for column in range(columns):
        for lane in range(lanes):
            out[column, lane] = np.int32(np.rint(np.float64(x[column, lane]) * up[lane]))


@njit(cache=True, nogil=True, fastmath=False)
def _advance(old: Ints, new: Ints, x: Ints, slopes: Ints, bases: Ints) -> None:
    """One column: ``new`` (2^k, lanes) = the least of old + base − x·slope over the predecessors.

    Eight predecessors at a time, for all b, so that their costs stay near.
    """
    symbols, lanes = old.shape
    for p in range(0, symbols, 8):
        d0, d1, d2, d3 = old[p], old[p + 1], old[p + 2], old[p + 3]
        d4, d5, d6, d7 = old[p + 4], old[p + 5], old[p + 6], old[p + 7]
        for b in range(symbols):
            out = new[b]
            s0, s1, s2, s3 = slopes[b, p], slopes[b, p + 1], slopes[b, p + 2], slopes[b, p + 3]
            s4, s5, s6, s7 = slopes[b, p + 4], slopes[b, p + 5], slopes[b, p + 6], slopes[b, p + 7]
            c0, c1, c2, c3 = bases[b, p], bases[b, p + 1], bases[b, p + 2], bases[b, p + 3]
            c4, c5, c6, c7 = bases[b, p + 4], bases[b, p + 5], bases[b, p + 6], bases[b, p + 7]
            # numba widens sums of int32 to int64; the casts let the compiler narrow the whole expression again.
            if p == 0:
                for lane in range(lanes):
                    v = x[lane]
                    m = min(np.int32(d0[lane] + c0 - v * s0), np.int32(d1[lane] + c1 - v * s1))
                    m = min(m, min(np.int32(d2[lane] + c2 - v * s2), np.int32(d3[lane] + c3 - v * s3)))
                    m = min(m, min(np.int32(d4[lane] + c4 - v * s4), np.int32(d5[lane] + c5 - v * s5)))
                    m = min(m, min(np.int32(d6[lane] + c6 - v * s6), np.int32(d7[lane] + c7 - v * s7)))
                    out[lane] = m
            else:
                for lane in range(lanes):
                    v = x[lane]
                    m = min(np.int32(d0[lane] + c0 - v * s0), np.int32(d1[lane] + c1 - v * s1))
                    m = min(m, min(np.int32(d2[lane] + c2 - v * s2), np.int32(d3[lane] + c3 - v * s3)))
                    m = min(m, min(np.int32(d4[lane] + c4 - v * s4), np.int32(d5[lane] + c5 - v * s5)))
                    m = min(m, min(np.int32(d6[lane] + c6 - v * s6), np.int32(d7[lane] + c7 - v * s7)))
                    out[lane] = min(out[lane], m)


@njit(cache=True, nogil=True, fastmath=False)
def _settle(new: Ints, cost: Ints, back: Bytes, low: Ints) -> None:
    """Split ``new`` into costs, the least of them 0, and predecessors, both (2^k, lanes)."""
    symbols, lanes = new.shape
    mask = np.int32(symbols - 1)
    for lane in range(lanes):
        low[lane] = new[0, lane]
    for b in range(1, symbols):
        for lane in range(lanes):
            low[lane] = min(low[lane], new[b, lane])
    for b in range(symbols):
        for lane in range(lanes):
            value = new[b, lane]
            back[b, lane] = value & mask
            cost[b, lane] = (value & ~mask) - (low[lane] & ~mask)


@njit(cache=True, nogil=True, fastmath=False)
def _forward(
    x: Ints, start: int, stop: int, cost: Ints, slopes: Ints, bases: Ints, back: Bytes, v: Ints, new: Ints, low: Ints
) -> None:
    """Columns ``start`` … ``stop`` − 1: ``cost`` from before them to after them, the predecessors into ``back``."""
    symbols, lanes = cost.shape
    for column in range(start, stop):
        for lane in range(lanes):
            v[lane] = min(max(x[column, lane], -LIMIT), LIMIT)
        if column == 0:
            for b in range(symbols):
                for lane in range(lanes):
                    new[b, lane] = bases[b, 0] - v[lane] * slopes[b, 0]
        else:
            _advance(cost, new, v, slopes, bases)
        _settle(new, cost, back[column - start], low)


@njit(cache=True, nogil=True, fastmath=False)
def viterbi(x: Ints, slopes: Ints, bases: Ints, codes: Bytes) -> None:
    """``codes`` (columns, lanes) = the symbols of the path of least squared error, exactly.

    ``x``: int32 (columns, lanes), weights in units of levels, FRACTION binary places. ``slopes``, ``bases``: int32
    (2^k, 2^k), [b, p]: 2·T shifted k places, and T² shifted FRACTION + k places, plus p.
    """
    columns, lanes = x.shape
    symbols = slopes.shape[0]
    spans = (columns + SPAN - 1) // SPAN
    saved = np.empty((spans, symbols, lanes), np.int32)
    back = np.empty((min(columns, SPAN), symbols, lanes), np.uint8)
    cost = np.zeros((symbols, lanes), np.int32)
    new = np.empty((symbols, lanes), np.int32)
    v = np.empty(lanes, np.int32)
    low = np.empty(lanes, np.int32)
    for span in range(spans):
        saved[span] = cost
        _forward(x, span * SPAN, min(columns, (span + 1) * SPAN), cost, slopes, bases, back, v, new, low)
    state = np.zeros(lanes, np.int64)
    for lane in range(lanes):
        for b in range(1, symbols):
            if cost[b, lane] < cost[state[lane], lane]:
                state[lane] = b
    for span in range(spans - 1, -1, -1):
        start, stop = span * SPAN, min(columns, (span + 1) * SPAN)
        if span < spans - 1:
            cost[:] = saved[span]
            _forward(x, start, stop, cost, slopes, bases, back, v, new, low)
        for column in range(stop - 1, start - 1, -1):
            for lane in range(lanes):
                codes[column, lane] = state[lane]
                state[lane] = back[column - start, state[lane], lane]


@njit(cache=True, nogil=True, fastmath=False)
def correlate(
    x: Ints, codes: Bytes, table: NDArray[np.int8], k: int, cross: NDArray[np.int64], power: NDArray[np.int64]
) -> None:
    """Σ x·T and Σ T² of each lane, int64 (lanes,)."""
    columns, lanes = x.shape
    previous = np.zeros(lanes, np.int64)
    cross[:] = 0
    power[:] = 0
    for column in range(columns):
        for lane in range(lanes):
            b = np.int64(codes[column, lane])
            level = np.int64(table[(previous[lane] << k) | b])
            previous[lane] = b
            cross[lane] += np.int64(x[column, lane]) * level
            power[lane] += level * level


@njit(cache=True, nogil=True, fastmath=False)
def squared_error(
    x: NDArray[np.float32], codes: Bytes, table: NDArray[np.int8], k: int, scales: NDArray[np.float64],
    skip_zeros: bool, out: NDArray[np.float64],
) -> None:  # fmt: skip
    """Σ (x − scale·T)² of each lane; ``skip_zeros`` leaves out weights that are 0 (outliers are stored apart)."""
    columns, lanes = x.shape
    previous = np.zeros(lanes, np.int64)
    out[:] = 0
    for column in range(columns):
        for lane in range(lanes):
            b = np.int64(codes[column, lane])
            level = np.float64(table[(previous[lane] << k) | b])
            previous[lane] = b
            if not (skip_zeros and x[column, lane] == 0):
                difference = np.float64(x[column, lane]) - scales[lane] * level
                out[lane] += difference * difference


@njit(cache=True, nogil=True, fastmath=False)
def pack(codes: Bytes, k: int, first: int, out: Bytes) -> None:
    """Write the symbols (columns, lanes) into rows ``first`` … of ``out`` (rows, bytes), most significant bit first."""
    columns = codes.shape[0]
    for lane in range(codes.shape[1]):
        row = out[first + lane]
        held, bits, place = np.int64(0), 0, 0
        for column in range(columns):
            held = (held << k) | np.int64(codes[column, lane])
            bits += k
            if bits >= 8:
                bits -= 8
                row[place] = (held >> bits) & 255
                held &= (1 << bits) - 1
                place += 1
        if bits:
            row[place] = (held << (8 - bits)) & 255


@njit(cache=True, nogil=True, fastmath=False)
def levels(codes: Bytes, k: int, table: NDArray[np.int8], first: int, last: int, out: NDArray[np.int8]) -> None:
    """Rows ``first`` … ``last`` − 1 of ``out`` (rows, columns) = T of the windows of ``codes`` (rows, bytes)."""
    columns = out.shape[1]
    mask = (1 << 2 * k) - 1
    for index in range(first, last):
        row = codes[index]
        target = out[index]
        if k == 4:
            held = np.int64(0)
            for pair in range(columns // 2):
                held = ((held & 15) << 8) | np.int64(row[pair])
                target[2 * pair] = table[held >> 4]
                target[2 * pair + 1] = table[held & 255]
            if columns % 2:
                target[columns - 1] = table[((held & 15) << 4) | (np.int64(row[columns // 2]) >> 4)]
        else:
            held, bits, place = np.int64(0), 0, 0
            for column in range(columns):
                if bits < k:
                    held = ((held & mask) << 8) | np.int64(row[place])
                    bits += 8
                    place += 1
                bits -= k
                target[column] = table[(held >> bits) & mask]


@njit(cache=True, nogil=True, fastmath=False)
def collect(
    weight: NDArray[np.float32], scale: np.float32, threshold: NDArray[np.float64], starts: NDArray[np.int64],
    first: int, last: int, positions: NDArray[np.int64],
) -> None:  # fmt: skip
    """The flat positions of weights beyond their row's threshold, row by row from ``starts`` (rows,) on, ascending."""
    columns = weight.shape[1]
    for row in range(first, last):
        place = starts[row]
        if place < starts[row + 1]:
            for column in range(columns):
                if np.float64(abs(weight[row, column] * scale)) > threshold[row]:
                    positions[place] = row * columns + column
                    place += 1


@njit(cache=True, nogil=True, fastmath=False)
def at_positions(
    codes: Bytes, k: int, table: NDArray[np.int8], columns: int, positions: NDArray[np.int64], out: NDArray[np.int8]
) -> None:
    """``out`` = the levels T at flat ``positions`` of ``codes`` (rows, bytes)."""
    mask = (1 << 2 * k) - 1
    symbol = (1 << k) - 1
    for index in range(positions.shape[0]):
        row = codes[positions[index] // columns]
        column = positions[index] % columns
        window = np.int64(0)
        for step in range(2):
            place = (column - 1 + step) * k
            if place >= 0:
                byte = place // 8
                pair = np.int64(row[byte]) << 8
                if byte + 1 < row.shape[0]:
                    pair |= np.int64(row[byte + 1])
                window = (window << k) | ((pair >> (16 - k - place % 8)) & symbol)
        out[index] = table[window & mask]


@njit(cache=True, nogil=True, fastmath=False)
def restore(
    levels: NDArray[np.int8], scales: NDArray[np.float32], signs: NDArray[np.float32], block: int, norm: np.float32,
    out: NDArray[np.float32],
) -> None:  # fmt: skip
    """``out`` (rows, columns) = levels·scale, the rotation undone: as ``hadamard.unrotate`` does it, in the cache."""
    rows, columns = levels.shape
    for row in range(rows):
        target = out[row]
        scale = scales[row]
        for column in range(columns):
            target[column] = np.float32(levels[row, column]) * scale
        if block > 1:
            stride = 1
            while stride < block:
                for group in range(0, columns, 2 * stride):
                    for column in range(group, group + stride):
                        upper, lower = target[column], target[column + stride]
                        target[column] = upper + lower
                        target[column + stride] = upper - lower
                stride *= 2
            for column in range(columns):
                target[column] = target[column] * norm * signs[column]
