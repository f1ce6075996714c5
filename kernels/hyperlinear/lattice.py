"""The product with a ``lattice`` weight: int8 levels times one step, and a few corrections.

Arguments shared by all: ``x`` (…, in); ``levels`` int8 (out, in); ``step`` Δ; ``index`` int64 (n,), ascending:
the flat positions of the weights that no level gives; ``values`` int32 (n,): the bits of those weights as fp32;
``bias`` (out,) or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyperlinear.cpu import SCRATCH_BYTES, blockwise, operand, rows_at_once, scale_rows
from kernels.hyperlinear.cpu_int8 import Int8Weight


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
    kind = torch.bfloat16 if operand(x) == torch.bfloat16 else torch.float32
    block = rows_at_once(out_features, columns * kind.itemsize, scratch_bytes)
    scratch = torch.empty((block, columns), dtype=kind)
    scales = torch.full((block,), step)
    bounds = block_bounds(index, out_features, columns, block)

    def rows(start: int, stop: int) -> Tensor:
        weight = scratch[: stop - start]
        scale_rows(levels[start:stop], scales, weight)
        first, last = bounds[start // block], bounds[start // block + 1]
        if first < last:
            exact = values[first:last].view(torch.float32).to(kind)
            weight.view(-1).index_copy_(0, index[first:last] - start * columns, exact)
        return weight

    return blockwise(x, rows, out_features, block, bias)


def block_bounds(index: Tensor, out_features: int, columns: int, block: int) -> list[int]:
    """Where among ascending flat positions those of each block of rows begin, and where the last ones end."""
    if block >= out_features:
        return [0, len(index)]
    starts = torch.arange(0, out_features + block, block).clamp_(max=out_features) * columns
    bounds: list[int] = torch.searchsorted(index, starts).tolist()
    return bounds


def int8_weight(levels: Tensor, step: float, index: Tensor, values: Tensor) -> Int8Weight:
    """The levels as they are. A weight that is stored as it is differs from its level by half a step at most, as every
    weight does, unless it is beyond ±127: then the difference is added."""
    exact = values.view(torch.float32)
    missing = exact - levels.view(-1)[index].to(torch.float32) * step
    far = missing.abs() > step
    return Int8Weight(levels, torch.full((levels.shape[0],), step), index[far], missing[far])
