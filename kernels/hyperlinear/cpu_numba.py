"""The compiled loops of the CPU's products: levels to weights, activations to int8 and back.

bf16 numbers are the upper halves of fp32 ones, rounded to nearest, ties to even, kept as uint16.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_ESCAPE = -128


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
            largest = max(largest, np.uint32(source[column].view(np.uint32) & np.uint32(0x7FFFFFFF)))
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
    """``out`` (rows, out) = sum · scale of the token · scale of the output + its bias."""
    for row in range(sums.shape[0]):
        scale, source, target = tokens[row], sums[row], out[row]
        for column in range(source.shape[0]):
            target[column] = np.float32(source[column]) * (scale * scales[column]) + bias[column]
