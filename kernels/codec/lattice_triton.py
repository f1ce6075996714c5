"""``lattice`` decoded on a GPU: a program a segment, its lanes side by side.

The lanes of a group that need a word find it by a running count among the lanes before them. A program waits for its
loads most of the time, so that many run on each multiprocessor: one warp each. Gives what ``lattice.levels``
gives, bit for bit. Also runs in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codec import rans
from kernels.codec.lattice import Corrections
from kernels.codec.lattice_format import LatticeTensor
from kernels.codec.lattice_tables import ESCAPE, LOWEST, ZERO_ROW, table

_RUN_TIME = ("rows", "columns", "rows_each", "lanes")


@triton.jit(do_not_specialize=_RUN_TIME)
def _decode_kernel(  # type: ignore[no-untyped-def]
    words,
    ends,
    states,
    classes,
    slots,
    levels,
    damaged,
    rows,
    columns,
    rows_each,
    lanes,
    LANES: tl.constexpr,
    FIRST_CLASS: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """Decode one segment into its rows of ``levels``, and say in ``damaged`` whether its words were wrong."""
    segment = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    used = lane < lanes
    at = tl.load(ends + segment)
    end = tl.load(ends + segment + 1)
    state = tl.load(states + segment * lanes + lane, mask=used, other=65536).to(tl.uint32, bitcast=True)
    for number in range(0, rows_each):
        row = segment * rows_each + number
        j = tl.load(classes + row, mask=row < rows, other=ZEROS).to(tl.int32)
        # Nothing is coded for rows of zeros, whose levels are there already.
        coded = tl.where(j == ZEROS, 0, columns)
        chosen = slots + (tl.where(j == ZEROS, FIRST_CLASS, j) - FIRST_CLASS) * 4096
        for first in range(0, coded, lanes):
            column = first + lane
            active = used & (column < columns)
            entry = tl.load(chosen + (state & 4095).to(tl.int32), mask=active, other=0).to(tl.uint32, bitcast=True)
            following = (entry >> 20) * (state >> 12) + ((entry >> 8) & 4095)
            state = tl.where(active, following, state)
            tl.store(levels + row * columns + column, ((entry & 255).to(tl.int32) - 128).to(tl.int8), mask=active)
            short = active & (state < 65536)
            place = at + tl.cumsum(short.to(tl.int32), 0) - 1
            # A damaged segment may want words that it has not.
            word = tl.load(words + place, mask=short & (place < end), other=0).to(tl.uint32) & 65535
            state = tl.where(short, (state << 16) | word, state)
            at += tl.sum(short.to(tl.int32), 0)
    wrong = tl.sum((used & (state != 65536)).to(tl.int32), 0) + (at != end).to(tl.int32)
    tl.store(damaged + segment, wrong)


def levels(encoded: LatticeTensor, device: torch.device | str) -> tuple[Tensor, Corrections]:
    """``lattice.levels`` on a GPU: the results are on ``device``. Raises ValueError for what does not decode.

    Waits for the device twice: to see whether all segments were sound, and how many weights escape.
    """
    parts = encoded.parts()
    segments, columns = parts.segments, encoded.columns
    if columns >= 1 << 31:
        raise ValueError(f"a row of {columns} weights is too long for the kernel")
    ends = np.concatenate([[0], np.cumsum(segments.counts, dtype=np.int64)])
    # At least one word, so that there is an address.
    words = np.append(segments.words.view(np.int16), np.int16(0))
    found = torch.zeros((encoded.rows, columns), dtype=torch.int8, device=device)
    damaged = torch.empty(len(segments.counts), dtype=torch.int32, device=device)
    _decode_kernel[(len(segments.counts),)](
        torch.from_numpy(words).to(device), torch.from_numpy(ends).to(device),
        torch.from_numpy(segments.states.view(np.int32)).to(device), torch.from_numpy(parts.classes).to(device),
        _slots(encoded.beta, torch.device(device)), found, damaged,
        encoded.rows, columns, min(rans.segment_rows(columns), encoded.rows), segments.states.shape[1],
        LANES=rans.LANES, FIRST_CLASS=LOWEST, ZEROS=ZERO_ROW, num_warps=1,
    )  # fmt: skip
    if bool(damaged.any()):
        segment = int(damaged.nonzero()[0])
        raise ValueError(f"segment {segment} does not decode: its words do not end where its weights do")
    flat = found.view(-1)
    index = (flat == ESCAPE).nonzero().view(-1)
    if index.numel() != parts.escapes.size:
        raise ValueError(f"the levels name {index.numel()} escapes, but there are {parts.escapes.size}")
    flat[index] = torch.from_numpy(encoded.nearest(parts.escapes)).to(device)
    return found, Corrections(index, torch.from_numpy(parts.escapes).to(device))


@functools.lru_cache(maxsize=16)
def _slots(beta: int, device: torch.device) -> Tensor:
    """The slots of all classes of a shape, int32 (classes, 4096) on the device: 1.4 MB."""
    return torch.from_numpy(table(beta).slots.view(np.int32).copy()).to(device)
