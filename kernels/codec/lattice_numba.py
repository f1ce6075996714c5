"""The compiled loops of ``lattice`` but its entropy coder: levels, classes, counts of levels, escapes.

Floating arithmetic rounds once an operation, in a stated order and without fused products, so that every machine makes
the same stream. v = fp32(w − offset); the level is rint(fp32(v / Δ)), ties to even.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_LANES = 16
_ZERO_ROW = -128
_ESCAPE = -128
_LARGEST = np.float32(126.0)
# 2^((2i + 1)/8), where the class of a mantissa changes: fourths of an octave of the mean square, rounded.
_M0, _M1, _M2, _M3 = 1.0905077326652577, 1.2968395546510096, 1.5422108254079408, 1.8340080864093424


@njit(cache=True, nogil=True, fastmath=False)
def class_of(energy: float, count: int, step: np.float32, lowest: int, highest: int) -> int:
    """round(8·log2(√(energy / count) / step)), kept to lowest … highest; by exact comparisons, without a logarithm."""
    if count == 0 or energy == 0.0:
        return lowest
    ratio = energy / (np.float64(count) * (np.float64(step) * np.float64(step)))
    octave = 0
    while ratio >= 2.0 and octave < 64:
        ratio *= 0.5
        octave += 1
    while ratio < 1.0 and octave > -64:
        ratio *= 2.0
        octave -= 1
    j = 4 * octave
    for bound in (_M0, _M1, _M2, _M3):
        if ratio >= bound:
            j += 1
    return min(max(j, lowest), highest)


@njit(cache=True, nogil=True, fastmath=False)
def _raw_levels(
    weights: NDArray[np.float32],
    step: np.float32,
    offset: np.float32,
    largest: np.float32,
    levels: NDArray[np.int8],
    sums: NDArray[np.float64],
) -> int:
    """Levels of a row, −128 for those no table codes; returns how many those are.

    ``sums`` (2, 16): sums of v² over the columns of each lane, of all weights and of those with a level.
    """
    columns = weights.shape[0]
    beyond = 0
    sums[:] = 0.0
    first = 0
    while first + _LANES <= columns:
        for lane in range(_LANES):
            v = weights[first + lane] - offset
            q = np.rint(v / step)
            fits = (abs(q) <= _LARGEST) & (abs(q * step + offset) <= largest)
            square = np.float64(v) * np.float64(v)
            sums[0, lane] += square
            sums[1, lane] += square if fits else 0.0
            levels[first + lane] = np.int8(np.int32(q if fits else np.float32(_ESCAPE)))
            beyond += int(not fits)
        first += _LANES
    for lane in range(columns - first):
        v = weights[first + lane] - offset
        q = np.rint(v / step)
        fits = (abs(q) <= _LARGEST) & (abs(q * step + offset) <= largest)
        square = np.float64(v) * np.float64(v)
        sums[0, lane] += square
        sums[1, lane] += square if fits else 0.0
        levels[first + lane] = np.int8(np.int32(q if fits else np.float32(_ESCAPE)))
        beyond += int(not fits)
    return beyond


@njit(cache=True, nogil=True, fastmath=False)
def _row_class(
    levels: NDArray[np.int8],
    sums: NDArray[np.float64],
    beyond: int,
    step: np.float32,
    lowest: int,
    cost: NDArray[np.int32],
) -> int:
    """The class of a row: of its weights that have a level, or of all where that makes the row cheaper."""
    columns = levels.shape[0]
    highest = lowest + cost.shape[0] - 1
    within = 0.0
    for lane in range(_LANES):
        within += sums[1, lane]
    if beyond == 0:
        some = np.int8(0)
        for column in range(columns):
            some |= levels[column]
        return _ZERO_ROW if some == 0 else class_of(within, columns, step, lowest, highest)
    energy = 0.0
    for lane in range(_LANES):
        energy += sums[0, lane]
    a = class_of(within, columns - beyond, step, lowest, highest)
    b = class_of(energy, columns, step, lowest, highest)
    if a == b:
        return a
    cost_a, cost_b = np.int64(0), np.int64(0)
    for column in range(columns):
        symbol = np.int64(levels[column]) + 128
        cost_a += cost[a - lowest, symbol]
        cost_b += cost[b - lowest, symbol]
    return a if cost_a <= cost_b else b


@njit(cache=True, nogil=True, fastmath=False)
def quantise(
    weights: NDArray[np.float32],
    step: np.float32,
    offset: np.float32,
    largest: np.float32,
    lowest: int,
    cost: NDArray[np.int32],
    limit: NDArray[np.int8],
    levels: NDArray[np.int8],
    classes: NDArray[np.int8],
) -> int:
    """Fill ``levels`` (rows, columns), −128 where a weight escapes, and ``classes`` (rows,); returns the escapes.

    ``weights``: finite, fp32 (rows, columns). ``largest``: the largest magnitude that the source's dtype holds.
    ``cost``, ``limit``: of the tensor's β, see ``lattice_tables.Table``.
    """
    rows, columns = weights.shape
    sums = np.empty((2, _LANES), np.float64)
    escapes = 0
    for row in range(rows):
        out = levels[row]
        beyond = _raw_levels(weights[row], step, offset, largest, out, sums)
        j = _row_class(out, sums, beyond, step, lowest, cost)
        classes[row] = j
        if j != _ZERO_ROW:
            most = limit[j - lowest]
            count = 0
            for column in range(columns):
                q = out[column]
                inside = (q <= most) & (q >= -most)
                out[column] = q if inside else np.int8(_ESCAPE)
                count += int(not inside)
            escapes += count
    return escapes


@njit(cache=True, nogil=True, fastmath=False)
def histogram(
    weights: NDArray[np.float32],
    step: np.float32,
    offset: np.float32,
    largest: np.float32,
    lowest: int,
    cost: NDArray[np.int32],
    counts: NDArray[np.int64],
) -> float:
    """Count levels by class into ``counts`` (classes, 256), index level + 128, 0 for weights without a level.

    Rows of zeros are not counted. Returns the sum of squared errors of the counted levels, as far as float64 goes.
    """
    rows, columns = weights.shape
    sums = np.empty((2, _LANES), np.float64)
    levels = np.empty(columns, np.int8)
    # Two sets of counts, so that a level repeated at once does not wait for its count; sums by lane likewise.
    odd_counts = np.zeros_like(counts)
    squares = np.zeros(_LANES, np.float64)
    for row in range(rows):
        beyond = _raw_levels(weights[row], step, offset, largest, levels, sums)
        j = _row_class(levels, sums, beyond, step, lowest, cost)
        if j != _ZERO_ROW:
            even, odd = counts[j - lowest], odd_counts[j - lowest]
            for column in range(0, columns - 1, 2):
                even[np.int64(levels[column]) + 128] += 1
                odd[np.int64(levels[column + 1]) + 128] += 1
            if columns % 2:
                even[np.int64(levels[columns - 1]) + 128] += 1
        first = 0
        while first < columns:
            if first + _LANES <= columns:
                for lane in range(_LANES):
                    squares[lane] += _squared_error(weights[row, first + lane], levels[first + lane], step, offset)
            else:
                for lane in range(columns - first):
                    squares[lane] += _squared_error(weights[row, first + lane], levels[first + lane], step, offset)
            first += _LANES
    counts += odd_counts
    total = 0.0
    for lane in range(_LANES):
        total += squares[lane]
    return total


@njit(cache=True, nogil=True, fastmath=False)
def _squared_error(weight: np.float32, level: np.int8, step: np.float32, offset: np.float32) -> float:
    error = np.float64(weight) - np.float64(np.float32(level) * step + offset)
    return error * error if level != _ESCAPE else 0.0


@njit(cache=True, nogil=True, fastmath=False)
def finite(weights: NDArray[np.float32]) -> bool:
    """Whether none of the weights (count,) is NaN or infinite."""
    worst = np.uint32(0)
    bits = weights.view(np.uint32)
    for place in range(bits.shape[0]):
        worst = max(worst, bits[place] & np.uint32(0x7FFFFFFF))
    return bool(worst < np.uint32(0x7F800000))


@njit(cache=True, nogil=True, fastmath=False)
def find(levels: NDArray[np.int8], index: NDArray[np.int64]) -> int:
    """Positions of the value −128 among ``levels`` (count,), ascending, into ``index``.

    Returns how many there are; those beyond the length of ``index`` are only counted.
    """
    found = 0
    place = 0
    while place < levels.shape[0]:
        stop = min(place + 256, levels.shape[0])
        least = np.int8(0)
        for each in range(place, stop):
            least = min(least, levels[each])
        if least == _ESCAPE:
            for each in range(place, stop):
                if levels[each] == _ESCAPE:
                    if found < index.shape[0]:
                        index[found] = each
                    found += 1
        place = stop
    return found


@njit(cache=True, nogil=True, fastmath=False)
def dense(levels: NDArray[np.int8], step: np.float32, offset: np.float32, out: NDArray[np.float32]) -> None:
    """``out`` (count,) = fp32(offset + fp32(step·level))."""
    for place in range(levels.shape[0]):
        out[place] = np.float32(levels[place]) * step + offset
