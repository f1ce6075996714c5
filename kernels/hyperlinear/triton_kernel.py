"""The product in one pass on a GPU: a tile of indices is decoded in registers and multiplied at once.

Each index fetches its pair of weights from the layer's table: at most 51 kB with the published options, so it
stays in the caches. The closed form of a node would spare the fetch, but only float64 arithmetic gives the
same bits as the codec's decoding, and that is slow on most GPUs; the table gives them by construction.

A pair holds the weights of columns 2p and 2p + 1, so a tile is multiplied as two products, of the even
columns and of the odd ones, with no shuffling of decoded weights between threads.

The sizes and strides of a layer are run-time arguments, on whose values nothing is specialised: one compiled
kernel a dtype and a size class of x serves all layers. Also runs in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: The dtypes of x that the kernel multiplies.
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)

_RUN_TIME = (
    "rows", "out_features", "in_features", "points",
    "x_row_stride", "x_column_stride", "index_row_stride", "out_row_stride", "has_bias",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME)
def _linear_kernel(  # type: ignore[no-untyped-def]
    x,
    indices,
    pairs,
    bias,
    out,
    rows,
    out_features,
    in_features,
    points,
    x_row_stride,
    x_column_stride,
    index_row_stride,
    out_row_stride,
    has_bias,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of the output, BLOCK_ROWS × BLOCK_OUT, over all columns."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    # 64-bit offsets: rows × columns passes 2^31 for large batches.
    row = (tile % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tile // row_tiles).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_in = row < rows
    column_in = column < out_features
    x_rows = x + row[:, None] * x_row_stride
    index_rows = indices + column[None, :] * index_row_stride
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for first in range(0, points, BLOCK_POINTS):
        point = first + tl.arange(0, BLOCK_POINTS)
        point_in = point < points
        index = tl.load(index_rows + point[:, None], mask=point_in[:, None] & column_in[None, :], other=0)
        pair = tl.load(pairs + index)
        even = pair.to(tl.int32).to(tl.float32, bitcast=True)
        odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        column_even = (2 * point).to(tl.int64)
        x_even = tl.load(
            x_rows + column_even[None, :] * x_column_stride,
            mask=row_in[:, None] & point_in[None, :],
            other=0.0,
        )
        # The last pair of an odd row has a padding weight; a zero here leaves it out.
        x_odd = tl.load(
            x_rows + (column_even[None, :] + 1) * x_column_stride,
            mask=row_in[:, None] & (2 * point[None, :] + 1 < in_features),
            other=0.0,
        )
        w_even = even.to(x_even.dtype)
        w_odd = odd.to(x_odd.dtype)
        if WIDEN:
            x_even, w_even = x_even.to(tl.float32), w_even.to(tl.float32)
            x_odd, w_odd = x_odd.to(tl.float32), w_odd.to(tl.float32)
        total = tl.dot(x_even, w_even, total, input_precision="ieee")
        total = tl.dot(x_odd, w_odd, total, input_precision="ieee")
    # has_bias is a run-time flag, so that layers with and without a bias share a kernel.
    total += tl.load(bias + column, mask=column_in & (has_bias != 0), other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + row[:, None] * out_row_stride + column[None, :],
        total.to(out.dtype.element_ty),
        mask=row_in[:, None] & column_in[None, :],
    )


# Triton's interpreter multiplies the bit patterns of bf16 operands as integers, so there they are widened once
# they are rounded. The products are the same: those of two bf16 numbers are exact in fp32.
_INTERPRETED = not isinstance(_linear_kernel, triton.JITFunction)


def _blocks(rows: int) -> dict[str, Any]:
    """Tile sizes for a number of rows of x: few rows (prompts, decoder tokens) or many (image tokens)."""
    if rows <= 32:
        return {"BLOCK_ROWS": 16, "BLOCK_OUT": 64, "BLOCK_POINTS": 64, "num_warps": 4}
    return {"BLOCK_ROWS": 64, "BLOCK_OUT": 64, "BLOCK_POINTS": 32, "num_warps": 4}


def linear(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """``x`` times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype. Arguments: see ``naive``.

    ``x`` is fp32, fp16 or bf16; a decoded weight is rounded to its dtype, products are summed in fp32 without
    TF32. ``out``: where to write, (rows of x, out), contiguous, of ``x``'s dtype. Raises TypeError for another
    dtype.
    """
    if x.dtype not in SUPPORTED:
        raise TypeError(f"the kernel multiplies {', '.join(map(str, SUPPORTED))}, not {x.dtype}")
    rows = x.reshape(-1, x.shape[-1])
    if out is None:
        out = torch.empty((rows.shape[0], indices.shape[0]), dtype=x.dtype, device=x.device)
    fill(out, rows, indices, pairs, bias)
    return out.view(*x.shape[:-1], indices.shape[0])


def fill(out: Tensor, x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None) -> None:
    """Write the product of a matrix ``x`` (rows, in) of any strides to ``out`` (rows, out), whose columns are dense."""
    rows, in_features = x.shape
    out_features, points = indices.shape
    if rows == 0 or out_features == 0:
        return
    blocks = _blocks(rows)
    tiles = triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(out_features, blocks["BLOCK_OUT"])
    # Where there is no bias the kernel gets something to point at, which it never reads.
    _linear_kernel[(tiles,)](
        x, indices, pairs, pairs.view(torch.float32) if bias is None else bias.contiguous(), out,
        rows, out_features, in_features, points,
        x.stride(0), x.stride(1), indices.stride(0), out.stride(0), int(bias is not None),
        **blocks, WIDEN=_INTERPRETED and x.dtype == torch.bfloat16,
    )  # fmt: skip
