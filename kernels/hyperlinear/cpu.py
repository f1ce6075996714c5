"""The product block by block: decode a few output rows into a scratch buffer, multiply, go on.

The scratch memory is bounded whatever the layer's size, and small enough to stay in the cache between its
decoding and the library's product. Nothing here is particular to CPUs: it also serves devices and dtypes
that have no kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.hyperlinear.naive import accumulator

#: Decoded weights held at once, in bytes; one row more where a row alone takes more. Their indices, widened to
#: what a gather takes, come to half as much again.
SCRATCH_BYTES = 4 << 20

Rows = Callable[[int, int], Tensor]
"""Decodes the output rows from the first number up to the second: fp32 (rows, in), good until the next call."""


def linear(
    x: Tensor,
    indices: Tensor,
    pairs: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """``x`` times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype. Arguments: see ``naive``.

    Products and sums are fp32 (float64 for a float64 ``x``), rounded once to ``x``'s dtype. ``out``: where to
    write, (rows of x, out), contiguous, of the accumulator's dtype.
    """
    out_features, points = indices.shape
    block = rows_at_once(out_features, points * 8, scratch_bytes)
    decoded = torch.empty(block * points, dtype=torch.int64, device=x.device)
    wanted = torch.empty(block * points, dtype=torch.int32, device=x.device)

    def rows(start: int, stop: int) -> Tensor:
        size = (stop - start) * points
        wanted[:size].view(-1, points).copy_(indices[start:stop])
        torch.index_select(pairs, 0, wanted[:size], out=decoded[:size])
        return decoded[:size].view(torch.float32).view(stop - start, 2 * points)[:, : x.shape[-1]]

    return blockwise(x, rows, out_features, block, bias, out=out)


def rows_at_once(out_features: int, row_bytes: int, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """How many output rows to decode at once: as many as fit, at least one."""
    return min(out_features, max(1, scratch_bytes // max(1, row_bytes)))


def blockwise(
    x: Tensor, rows: Rows, out_features: int, block: int, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """``x`` (…, in) times a weight that ``rows`` decodes ``block`` output rows at a time, plus ``bias``."""
    wide = accumulator(x)
    flat = x.reshape(-1, x.shape[-1]).to(wide)
    if out is None:
        out = torch.empty((flat.shape[0], out_features), dtype=wide, device=x.device)
    for start in range(0, out_features if flat.shape[0] else 0, block):
        stop = min(start + block, out_features)
        weight, target = rows(start, stop).to(wide).t(), out[:, start:stop]
        if bias is None:
            torch.mm(flat, weight, out=target)
        else:
            torch.addmm(bias[start:stop].to(wide), flat, weight, out=target)
    return out.view(*x.shape[:-1], out_features).to(x.dtype)
