"""The compiled loops of the CPU's products: levels to weights, activations to int8 and back.

bf16 numbers are the upper halves of fp32 ones, rounded to nearest, ties to even, kept as uint16.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_LANES = 16


@njit(cache=True, nogil=True, fastmath=False)
def to_bf16(levels: NDArray[np.int8], scales: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """``out`` (rows, columns) = bf16(fp32(level · scale of the row))."""
    for row in range(levels.shape[0]):
        scale, source, target = scales[row], levels[row], out[row]
        for column in range(source.shape[0]):
            bits = np.float32(np.float32(source[column]) * scale).view(np.uint32)
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            target[column] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@njit(cache=True, nogil=True, fastmath=False)
def to_fp32(levels: NDArray[np.int8], scales: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``out`` (rows, columns) = fp32(level · scale of the row)."""
    for row in range(levels.shape[0]):
        scale, source, target = scales[row], levels[row], out[row]
        for column in range(source.shape[0]):
            target[column] = np.float32(source[column]) * scale


@njit(cache=True, nogil=True, fastmath=False)
def gather32(indices: NDArray[np.int16], table: NDArray[np.int32], out: NDArray[np.int32]) -> None:
    """``out`` (rows, points) = the table's entries, two bf16 weights each."""
    for row in range(indices.shape[0]):
        source, target = indices[row], out[row]
        for point in range(source.shape[0]):
            target[point] = table[source[point]]


@njit(cache=True, nogil=True, fastmath=False)
def gather64(indices: NDArray[np.int16], table: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """``out`` (rows, points) = the table's entries, two fp32 weights each."""
    for row in range(indices.shape[0]):
        source, target = indices[row], out[row]
        for point in range(source.shape[0]):
            target[point] = table[source[point]]


@njit(cache=True, nogil=True, fastmath=False)
def gather16(indices: NDArray[np.int16], table: NDArray[np.int16], out: NDArray[np.int16]) -> None:
    """``out`` (rows, points) = the table's entries, two int8 weights each."""
    for row in range(indices.shape[0]):
        source, target = indices[row], out[row]
        for point in range(source.shape[0]):
            target[point] = table[source[point]]


@njit(cache=True, nogil=True, fastmath=False)
def quantise(x: NDArray[np.float32], out: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
    """Each row of ``x`` (rows, columns) to int8, its largest magnitude to 127; ``scales`` (rows,) undo it."""
    for row in range(x.shape[0]):
        source, target = x[row], out[row]
        largest = np.uint32(0)
        for column in range(source.shape[0]):
            # Of positive floating numbers the bits compare as the numbers do.
            largest = max(largest, np.uint32(np.float32(source[column]).view(np.uint32) & np.uint32(0x7FFFFFFF)))
        top = np.uint32(largest).view(np.float32)
        scales[row] = top / np.float32(127.0)
        up = np.float32(127.0) / top if top > 0 else np.float32(0.0)
        for column in range(source.shape[0]):
            target[column] = np.int8(np.int32(np.rint(np.float32(source[column] * up))))


@njit(cache=True, nogil=True, fastmath=False)
def finish(
    sums: NDArray[np.int32],
    tokens: NDArray[np.float32],
    scales: NDArray[np.float32],
    bias: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """``out`` (tokens, out) = sum · scale of the token · scale of the output + its bias."""
    for token in range(sums.shape[0]):
        scale, source, target = tokens[token], sums[token], out[token]
        for column in range(source.shape[0]):
            target[column] = np.float32(source[column]) * (scale * scales[column]) + bias[column]


@njit(cache=True, nogil=True, fastmath=False)
def add_sparse(
    x: NDArray[np.float32],
    starts: NDArray[np.int64],
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Add to ``out`` (tokens, out) what ``x`` (tokens, in) makes with few weights, whose ``columns`` and ``values``
    are those of each output from ``starts`` (out + 1,) on. Sixteen tokens at a time, so that they fill a register."""
    turned = np.zeros((x.shape[1], _LANES), np.float32)
    total = np.empty(_LANES, np.float32)
    for first in range(0, x.shape[0], _LANES):
        count = min(_LANES, x.shape[0] - first)
        for lane in range(count):
            source = x[first + lane]
            for column in range(x.shape[1]):
                turned[column, lane] = source[column]
        for row in range(starts.shape[0] - 1):
            if starts[row] == starts[row + 1]:
                continue
            total[:] = 0
            for place in range(starts[row], starts[row + 1]):
                value, source = values[place], turned[columns[place]]
                for lane in range(_LANES):
                    total[lane] += source[lane] * value
            for lane in range(count):
                out[first + lane, row] += total[lane]
