"""The compiled loops of ``rans``: a whole tensor's segments, coded and decoded by interleaved lanes.

Everything is integer, so streams are equal on every machine. Whole groups of 16 lanes take the fast path; the last
group of a row that 16 does not divide, and tensors of one lane, the plain one.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

LANES = 16
INITIAL = 1 << 16
"""A lane's state before its first symbol is coded, and after its last is decoded."""
_ZERO_ROW = -128


@njit(cache=True, nogil=True, fastmath=False)
def encode(
    levels: NDArray[np.int8],
    classes: NDArray[np.int8],
    lowest: int,
    rows_each: int,
    lanes: int,
    frequency: NDArray[np.int32],
    start: NDArray[np.int32],
    inverse: NDArray[np.uint64],
    scratch: NDArray[np.uint16],
    counts: NDArray[np.uint32],
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
) -> int:
    """Fill ``counts`` (segments,), ``states`` (segments, lanes) and ``words``; returns the number of words.

    ``levels`` (rows, columns): −128 where a weight escapes, otherwise levels that the row's table codes. ``scratch``
    holds the weights of a segment, ``words`` those of the tensor. A segment is coded from its last weight to its
    first, into ``scratch`` from its end, so that a decoder reads forwards.
    """
    rows, columns = levels.shape
    x = np.empty(lanes, np.uint32)
    total = 0
    for segment in range(counts.shape[0]):
        first, last = segment * rows_each, min(rows, (segment + 1) * rows_each)
        x[:] = INITIAL
        at = scratch.shape[0]
        for row in range(last - 1, first - 1, -1):
            if classes[row] == _ZERO_ROW:
                continue
            number = classes[row] - lowest
            f_row, s_row, i_row = frequency[number], start[number], inverse[number]
            group = (columns - 1) // lanes * lanes
            while group >= 0:
                for lane in range(min(lanes, columns - group) - 1, -1, -1):
                    symbol = np.int64(levels[row, group + lane]) + 128
                    f = np.uint32(f_row[symbol])
                    state = x[lane]
                    # Emitting is not predictable: the word is always written, and kept where it counts.
                    full = np.uint64(state) >= (np.uint64(f) << np.uint64(20))
                    scratch[at - 1] = np.uint16(state)
                    at -= int(full)
                    state = np.uint32(state >> (np.uint32(16) * np.uint32(full)))
                    quotient = np.uint32((np.uint64(state) * i_row[symbol]) >> np.uint64(44))
                    x[lane] = np.uint32(state + quotient * (np.uint32(4096) - f) + np.uint32(s_row[symbol]))
                group -= lanes
        count = scratch.shape[0] - at
        counts[segment] = count
        for lane in range(lanes):
            states[segment, lane] = x[lane]
        words[total : total + count] = scratch[at:]
        total += count
    return total


@njit(cache=True, nogil=True, fastmath=False)
def decode(
    words: NDArray[np.uint16],
    counts: NDArray[np.uint32],
    states: NDArray[np.uint32],
    classes: NDArray[np.int8],
    lowest: int,
    rows_each: int,
    slots: NDArray[np.uint32],
    levels: NDArray[np.int8],
) -> int:
    """Fill ``levels`` (rows, columns), −128 where a weight escapes; returns the first damaged segment, or −1.

    ``counts`` must sum to the length of ``words``; no word is read beyond a segment's own.
    """
    rows, columns = levels.shape
    lanes = states.shape[1]
    x = np.empty(lanes, np.uint32)
    low = np.uint32(1 << 16)
    at = 0
    for segment in range(counts.shape[0]):
        first, last = segment * rows_each, min(rows, (segment + 1) * rows_each)
        end = at + np.int64(counts[segment])
        for lane in range(lanes):
            x[lane] = states[segment, lane]
        for row in range(first, last):
            if classes[row] == _ZERO_ROW:
                levels[row, :] = 0
                continue
            table = slots[classes[row] - lowest]
            out = levels[row]
            column = 0
            if lanes == LANES:
                while column + LANES <= columns and at + LANES <= end:
                    for lane in range(LANES):
                        state = x[lane]
                        entry = table[state & np.uint32(4095)]
                        state = (entry >> np.uint32(20)) * (state >> np.uint32(12)) + (
                            (entry >> np.uint32(8)) & np.uint32(4095)
                        )
                        out[column + lane] = np.int8(np.int64(entry & np.uint32(255)) - 128)
                        # Whether a word is needed is not predictable: it is always read, and taken where it is.
                        # Written so that it compiles to no branch, which doubles the speed.
                        short = np.uint32(state < low)
                        word = np.uint32(words[at]) & (np.uint32(0) - short)
                        x[lane] = (state << (short << np.uint32(4))) | word
                        at += int(short)
                    column += LANES
            while column < columns:
                for lane in range(min(lanes, columns - column)):
                    state = x[lane]
                    entry = table[state & np.uint32(4095)]
                    state = (entry >> np.uint32(20)) * (state >> np.uint32(12)) + (
                        (entry >> np.uint32(8)) & np.uint32(4095)
                    )
                    out[column + lane] = np.int8(np.int64(entry & np.uint32(255)) - 128)
                    if state < low:
                        if at >= end:
                            return segment
                        state = (state << np.uint32(16)) | np.uint32(words[at])
                        at += 1
                    x[lane] = state
                column += lanes
        if at != end:
            return segment
        for lane in range(lanes):
            if x[lane] != low:
                return segment
    return -1
