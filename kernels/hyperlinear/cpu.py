"""The product block by block: decode a few output rows into a scratch buffer, multiply, go on.

The scratch memory is bounded whatever the layer's size, and small enough to stay in the cache between its
decoding and the library's product. Nothing here is particular to CPUs: it also serves devices and dtypes
that have no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyperlinear.naive import accumulator

#: Decoded weights held at once, in bytes; one row more where a row alone takes more. Their indices, widened to
#: what a gather takes, come to half as much again.
SCRATCH_BYTES = 4 << 20


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
    in_features, out_features = x.shape[-1], indices.shape[0]
    wide = accumulator(x)
    rows = x.reshape(-1, in_features).to(wide)
    if out is None:
        out = torch.empty((rows.shape[0], out_features), dtype=wide, device=x.device)
    if rows.shape[0]:
        _fill(out, rows, indices, pairs, bias, scratch_bytes)
    return out.view(*x.shape[:-1], out_features).to(x.dtype)


def _fill(out: Tensor, rows: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None, scratch_bytes: int) -> None:
    in_features = rows.shape[1]
    out_features, points = indices.shape
    block = min(out_features, max(1, scratch_bytes // (points * 8)))
    decoded = torch.empty(block * points, dtype=torch.int64, device=rows.device)
    wanted = torch.empty(block * points, dtype=torch.int32, device=rows.device)
    for start in range(0, out_features, block):
        stop = min(start + block, out_features)
        size = (stop - start) * points
        wanted[:size].view(-1, points).copy_(indices[start:stop])
        torch.index_select(pairs, 0, wanted[:size], out=decoded[:size])
        weight = decoded[:size].view(torch.float32).view(stop - start, 2 * points)[:, :in_features]
        target = out[:, start:stop]
        if bias is None:
            torch.mm(rows, weight.to(rows.dtype).t(), out=target)
        else:
            torch.addmm(bias[start:stop].to(rows.dtype), rows, weight.to(rows.dtype).t(), out=target)
