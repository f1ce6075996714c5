"""The product with a ``lattice`` weight: int8 levels times one step, and a few corrections.

Arguments shared by all: ``x`` (…, in); ``levels`` int8 (out, in); ``step`` Δ; ``index`` int64 (n,), ascending:
the flat positions of the weights that no level gives; ``values`` int32 (n,): the bits of those weights as fp32;
``bias`` (out,) or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyperlinear.cpu import SCRATCH_BYTES, blockwise, rows_at_once


def dense(levels: Tensor, step: float, index: Tensor, values: Tensor) -> Tensor:
    """The weight: fp32 (out, in), bit for bit as the codec decodes it."""
    weight = levels.to(torch.float32).mul_(step)
    weight.view(-1).index_copy_(0, index, values.view(torch.float32))
    return weight


def linear(
    x: Tensor,
    levels: Tensor,
    step: float,
    index: Tensor,
    values: Tensor,
    bias: Tensor | None,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """``x`` times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype.

    On a CPU a few rows are decoded at a time. Elsewhere the whole weight is decoded into scratch memory, which
    needs no look at where the corrections of a block begin, so nothing waits for the device.
    """
    out_features, columns = levels.shape
    if x.device.type != "cpu":
        return blockwise(x, lambda start, stop: dense(levels, step, index, values), out_features, out_features, bias)
    block = rows_at_once(out_features, columns * 4, scratch_bytes)
    scratch = torch.empty((block, columns), dtype=torch.float32)
    starts = torch.arange(0, out_features + block, block).clamp_(max=out_features) * columns
    bounds = torch.searchsorted(index, starts).tolist() if index.numel() else [0] * len(starts)

    def rows(start: int, stop: int) -> Tensor:
        weight = scratch[: stop - start]
        weight.copy_(levels[start:stop]).mul_(step)
        first, last = bounds[start // block], bounds[start // block + 1]
        if first < last:
            weight.view(-1).index_copy_(0, index[first:last] - start * columns, values[first:last].view(torch.float32))
        return weight

    return blockwise(x, rows, out_features, block, bias)
