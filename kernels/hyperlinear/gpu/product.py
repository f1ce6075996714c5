"""The product in one pass: a tile of codes is decoded in registers and multiplied at once.

A program makes the transposed tile of the output, weight times activations, so that what is decoded is the product's
first operand, which Hopper's matrix units take from registers. Sums are fp32 over operands in the dtype of x (fp32
without TF32), or int32 over int8 ones. Scales, corrections, bias and the one rounding come after the sum.

Sizes, strides, scales and whether there is a bias are run-time arguments. A kernel is compiled once for a form, a
dtype and a tile; once more for layers with corrections, and where addresses or rows are no multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hyperlinear.gpu import weight as forms
from kernels.hyperlinear.gpu.tile import LATTICE, decoded, lower_bound
from kernels.hyperlinear.gpu.weight import CompressedWeight

#: The dtypes of x that the kernel multiplies; int8 with a scale a row.
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)

_NOT_SPECIALISED = (
    "step", "count", "steps", "added", "rows", "out_features", "out_row_stride", "has_x_scales", "has_scales",
    "has_bias",
)  # fmt: skip
_NOT_ALIGNED = ("x_scales", "table", "scales", "index", "values", "bias")


@triton.jit(do_not_specialize=_NOT_SPECIALISED, do_not_specialize_on_alignment=_NOT_ALIGNED)
def _product_kernel(  # type: ignore[no-untyped-def]
    x, x_scales, codes, table, scales, step, index, values, count, steps, added, bias, out,
    rows, out_features, in_features, x_row_stride, code_stride, out_row_stride, has_x_scales, has_scales, has_bias,
    FORM: tl.constexpr, BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, GROUP: tl.constexpr,
    CORRECTED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of the output, BLOCK_ROWS × BLOCK_OUT, over all columns of the weight."""
    # GROUP tiles of rows share the tiles of the weight that they need while those are in the L2 cache.
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    in_group = GROUP * tl.cdiv(out_features, BLOCK_OUT)
    first_tile = tile // in_group * GROUP
    group_rows = tl.minimum(row_tiles - first_tile, GROUP)
    row_tile = first_tile + (tile % in_group) % group_rows
    column_tile = (tile % in_group) // group_rows
    row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_in = row < rows
    column_in = column < out_features
    x_rows = x + row[None, :] * x_row_stride

    if x.dtype.element_ty == tl.int8:
        total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
    for first in range(0, in_features, BLOCK_IN):
        place = first + tl.arange(0, BLOCK_IN)
        # Zeros here leave out what is decoded beyond the last column.
        inside = (place < in_features)[:, None] & row_in[None, :]
        activations = tl.load(x_rows + place[:, None], mask=inside, other=0)
        weights = decoded(
            codes, table, column, column_in, first, code_stride, in_features, FORM, BITS, BLOCK_OUT, BLOCK_IN
        )
        if x.dtype.element_ty == tl.int8:
            total = tl.dot(weights, activations, total, out_dtype=tl.int32)
        else:
            if WIDEN:
                # Levels are whole numbers that bf16 holds; only decoded fp32 weights are rounded.
                weights = weights.to(tl.float32)
                weights = weights.to(tl.bfloat16).to(tl.float32)
                activations = activations.to(tl.float32)
            else:
                weights = weights.to(activations.dtype)
            total = tl.dot(weights, activations, total, input_precision="ieee")

    scale = tl.load(scales + column, mask=column_in & (has_scales != 0), other=1.0) * step
    result = total.to(tl.float32) * scale[:, None]
    if CORRECTED:
        result = _corrected(
            result,
            x_rows,
            codes,
            index,
            values,
            count,
            steps,
            added,
            column,
            row_in,
            code_stride,
            in_features,
            step,
            FORM,
        )
    # Flags and not constants, so that layers with and without them share a kernel.
    result *= tl.load(x_scales + row, mask=row_in & (has_x_scales != 0), other=1.0)[None, :]
    result += tl.load(bias + column, mask=column_in & (has_bias != 0), other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + row[:, None] * out_row_stride + column[None, :],
        tl.trans(result).to(out.dtype.element_ty),
        mask=row_in[:, None] & column_in[None, :],
    )


@triton.jit
def _corrected(  # type: ignore[no-untyped-def]
    result, x_rows, codes, index, values, count, steps, added, column, row_in, code_stride, in_features, step,
    FORM: tl.constexpr,
):  # fmt: skip
    """``result`` (BLOCK_OUT, BLOCK_ROWS) and the product with the weights that the codes do not give.

    Each row of the weight finds its own by bisection, and adds them one after another: the same sum every time.
    """
    at = lower_bound(index, count, steps, column * in_features)
    end = lower_bound(index, count, steps, (column + 1) * in_features)
    for _ in range(0, tl.max(end - at, 0)):
        there = at < end
        place = tl.load(index + at, mask=there, other=0) - column * in_features
        value = tl.load(values + at, mask=there, other=0.0)
        if FORM == LATTICE:
            level = tl.load(codes + column * code_stride + place, mask=there & (added == 0), other=0)
            value -= level.to(tl.float32) * step
        activations = tl.load(x_rows + place[:, None], mask=there[:, None] & row_in[None, :], other=0)
        result += value[:, None] * activations.to(tl.float32)
        at += 1
    return result


# Triton's interpreter takes the bit patterns of bf16 numbers for integers in products and in casts from integers, so
# there operands are widened once they are rounded. The products are the same: two bf16 numbers' is exact in fp32.
INTERPRETED = not isinstance(_product_kernel, triton.JITFunction)


def fill(
    out: Tensor, x: Tensor, weight: CompressedWeight, bias: Tensor | None, tile: tuple[int, int, int], *,
    warps: int = 4, stages: int = 3, x_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the product of ``x`` (rows, in), dense rows, to ``out`` (rows, out), dense rows, of any floating dtype.

    ``x``: of a dtype in SUPPORTED, already rotated; or int8 with ``x_scales`` fp32 (rows,), and then the weight's table
    gives int8. ``tile``: rows, outputs and inputs of a tile, powers of two. ``warps``, ``stages``: Triton's.
    """
    rows = x.shape[0]
    if rows == 0 or weight.out_features == 0:
        return
    block_rows, block_out, block_in = tile
    count = 0 if weight.index is None else weight.index.numel()
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(weight.out_features, block_out)
    # Where there is nothing the kernel gets something of the right type to point at, which it never reads.
    nothing = scratch_fp32(x.device)
    _product_kernel[(tiles,)](
        x, _or(x_scales, nothing), weight.codes, _or(weight.table, weight.codes), _or(weight.scales, nothing),
        weight.step, _or(weight.index, nothing.view(torch.int64)), _or(weight.values, nothing), count,
        count.bit_length(), int(weight.added), _or(None if bias is None else bias.contiguous(), nothing), out,
        rows, weight.out_features, weight.columns, x.stride(0), weight.codes.stride(0), out.stride(0),
        int(x_scales is not None), int(weight.scales is not None), int(bias is not None),
        FORM=weight.form, BITS=weight.bits, BLOCK_ROWS=block_rows, BLOCK_OUT=block_out, BLOCK_IN=block_in, GROUP=8,
        CORRECTED=count > 0, WIDEN=INTERPRETED and x.dtype == torch.bfloat16, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def scratch_fp32(device: torch.device) -> Tensor:
    """Two numbers that no kernel reads."""
    return torch.empty(2, dtype=torch.float32, device=device)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def int8_weight(weight: CompressedWeight) -> CompressedWeight:
    """The same weight with codes that decode to int8: a birkhoff's pairs are rounded to 255 steps of their largest.

    The others decode to int8 as they are.
    """
    if weight.form != forms.BIRKHOFF or weight.table is None:
        return weight
    pairs = weight.table.view(torch.float32)
    step = pairs.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny) / 127
    table = (pairs / step).round_().to(torch.int8).view(torch.int16)
    changes: dict[str, Any] = {"table": table, "scales": step.expand(weight.out_features).contiguous()}
    return CompressedWeight(**{**weight.__dict__, **changes})
