"""Decoding a tile of a compressed weight in registers: shared by the kernels that multiply and those that decode.

Rows of a tile are the weight's rows (outputs), its columns the weight's columns (inputs), in their natural order.
Offsets are 64-bit: a weight may have more than 2^31 codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hyperlinear.gpu import weight

BIRKHOFF = tl.constexpr(weight.BIRKHOFF)
LATTICE = tl.constexpr(weight.LATTICE)
ORBIT = tl.constexpr(weight.ORBIT)


@triton.jit
def decoded(  # type: ignore[no-untyped-def]
    codes, table, column, column_in, first, code_stride, in_features,
    FORM: tl.constexpr, BITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """The tile (BLOCK_OUT, BLOCK_IN) of the rows ``column`` (int64) from the column ``first`` on, without scales.

    int8 levels (lattice, orbit, a birkhoff table of int8 pairs) or fp32 weights (a birkhoff table of fp32 pairs). What
    lies beyond the weight is unspecified, but finite.
    """
    if FORM == LATTICE:
        place = first + tl.arange(0, BLOCK_IN)
        inside = column_in[:, None] & (place < in_features)[None, :]
        return tl.load(codes + column[:, None] * code_stride + place[None, :], mask=inside, other=0)
    elif FORM == BIRKHOFF:
        return _pairs(codes, table, column, column_in, first, code_stride, in_features, BLOCK_OUT, BLOCK_IN)
    else:
        return _orbits(codes, table, column, column_in, first, code_stride, in_features, BITS, BLOCK_OUT, BLOCK_IN)


@triton.jit
def _pairs(  # type: ignore[no-untyped-def]
    codes, table, column, column_in, first, code_stride, in_features, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
):
    """Each index fetches its pair from the table: at most 51 kB with the published options, so it stays in the cache.

    The closed form of a node would spare the fetch, but only float64 gives the bits that the codec decodes.
    """
    point = first // 2 + tl.arange(0, BLOCK_IN // 2)
    inside = column_in[:, None] & (2 * point < in_features)[None, :]
    index = tl.load(codes + column[:, None] * code_stride + point[None, :], mask=inside, other=0)
    pair = tl.load(table + index)
    if table.dtype.element_ty == tl.int64:
        even = pair.to(tl.int32).to(tl.float32, bitcast=True)
        odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        even = pair.to(tl.int8)
        odd = (pair >> 8).to(tl.int8)
    return tl.reshape(tl.join(even, odd), (BLOCK_OUT, BLOCK_IN))


@triton.jit
def _orbits(  # type: ignore[no-untyped-def]
    codes, table, column, column_in, first, code_stride, in_features,
    BITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Eight digits of k bits fill k whole bytes. With the byte before, whose last k bits are the digit before, they are
    one 64-bit word, from which every window of 2k bits is a shift by a constant and a mask.
    """
    group = first // 8 + tl.arange(0, BLOCK_IN // 8)
    start = group * BITS
    row_bytes = (in_features * BITS + 7) // 8
    byte = codes + column[:, None] * code_stride + start[None, :]
    word = tl.load(byte - 1, mask=column_in[:, None] & ((start > 0) & (start <= row_bytes))[None, :], other=0)
    word = word.to(tl.int64)
    for number in tl.static_range(BITS):
        inside = column_in[:, None] & (start + number < row_bytes)[None, :]
        word = (word << 8) | tl.load(byte + number, mask=inside, other=0).to(tl.int64)
    # The joins put the eight side by side in one thread: digit 4i + 2j + l is at (i, j, l).
    w0 = _window(table, word, 0, BITS)
    w1 = _window(table, word, 1, BITS)
    w2 = _window(table, word, 2, BITS)
    w3 = _window(table, word, 3, BITS)
    w4 = _window(table, word, 4, BITS)
    w5 = _window(table, word, 5, BITS)
    w6 = _window(table, word, 6, BITS)
    w7 = _window(table, word, 7, BITS)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (BLOCK_OUT, BLOCK_IN))


@triton.jit
def _window(table, word, NUMBER: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The level of digit NUMBER of a word of eight."""
    return tl.load(table + ((word >> ((7 - NUMBER) * BITS)) & ((1 << (2 * BITS)) - 1)).to(tl.int32))


@triton.jit
def lower_bound(index, count, steps, key):  # type: ignore[no-untyped-def]
    """How many of the ``count`` ascending numbers are under each ``key`` (int64). ``steps``: the bits of ``count``."""
    low = tl.zeros_like(key)
    high = low + count
    for _ in range(0, steps):
        middle = (low + high) // 2
        searching = low < high
        under = tl.load(index + middle, mask=searching, other=0) < key
        low = tl.where(searching & under, middle + 1, low)
        high = tl.where(searching & (under == 0), middle, high)
    return low
