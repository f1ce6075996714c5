"""Entropy coding of levels: rANS with interleaved lanes, in independent segments of whole rows.

States are 32 bits and at least 2^16, words 16 bits, frequencies out of 2^12. Lane l of 16 codes the columns l, l + 16 …
of every row of a segment; a row's last group may leave lanes idle. Tensors of few weights have one lane, because the
states are stored with every segment. A segment has as many rows as fit 65,536 weights, at least one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.codec import rans_numba
from kernels.codec.lattice_tables import LOWEST, Table

SEGMENT_WEIGHTS = 1 << 16
INITIAL = rans_numba.INITIAL
LANES = rans_numba.LANES
_FEW_WEIGHTS = 1 << 14


def lane_count(rows: int, columns: int) -> int:
    """Lanes of every segment of a matrix: 16, or 1 under 16,384 weights."""
    return LANES if rows * columns >= _FEW_WEIGHTS else 1


def segment_rows(columns: int) -> int:
    """Rows of every segment but the last, which may have fewer."""
    return max(1, SEGMENT_WEIGHTS // columns)


def segment_count(rows: int, columns: int) -> int:
    """Segments of a matrix."""
    return -(-rows // segment_rows(columns))


@dataclass(frozen=True, eq=False)
class Segments:
    """What the coder makes of a matrix.

    ``counts``: uint32 (segments,), the words of each. ``states``: uint32 (segments, lanes), those a decoder starts
    with. ``words``: uint16, all segments' one after another, in the order a decoder reads them.
    """

    counts: NDArray[np.uint32]
    states: NDArray[np.uint32]
    words: NDArray[np.uint16]


def encode(levels: NDArray[np.int8], classes: NDArray[np.int8], table: Table) -> Segments:
    """Code ``levels``, int8 (rows, columns), each of which its row's table must code, or −128 for an escape.

    ``classes``: int8 (rows,); nothing is coded for rows of zeros. Raises ValueError for rows of 2^32 weights and more.
    """
    rows, columns = levels.shape
    if columns >= 1 << 32:
        raise ValueError(f"a row of {columns} weights is too long for a segment")
    rows_each = segment_rows(columns)
    segments, lanes = segment_count(rows, columns), lane_count(rows, columns)
    counts = np.zeros(segments, dtype=np.uint32)
    states = np.empty((segments, lanes), dtype=np.uint32)
    # A weight emits one word at most. The first is written even where it is not kept.
    scratch = np.empty(min(rows_each, rows) * columns + 1, dtype=np.uint16)
    words = np.empty(levels.size, dtype=np.uint16)
    total = rans_numba.encode(
        levels, classes, LOWEST, rows_each, lanes, table.frequency, table.start, table.inverse,
        scratch, counts, states, words,
    )  # fmt: skip
    return Segments(counts, states, words[:total])


def decode(segments: Segments, classes: NDArray[np.int8], columns: int, table: Table) -> NDArray[np.int8]:
    """Undo ``encode``: int8 (rows, columns), −128 where a weight escapes.

    The shapes in ``segments`` must be those of the matrix, ``classes`` have tables or be those of rows of zeros, and
    the counts sum to the number of words. Raises ValueError for words that no encoder has made.
    """
    levels = np.empty((len(classes), columns), dtype=np.int8)
    damaged = rans_numba.decode(
        segments.words, segments.counts, segments.states, classes, LOWEST, segment_rows(columns), table.slots, levels
    )
    if damaged >= 0:
        raise ValueError(f"segment {damaged} does not decode: its words do not end where its weights do")
    return levels
