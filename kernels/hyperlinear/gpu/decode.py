"""Decoding a whole weight into scratch memory, for the library's product.

The scratch memory comes from torch's caching allocator and goes back to it after the product, so that layer after layer
takes the same block: the peak is one block of the largest layer, on every stream and within every CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hyperlinear.gpu.product import scratch_fp32
from kernels.hyperlinear.gpu.tile import decoded
from kernels.hyperlinear.gpu.weight import LATTICE, CompressedWeight

_BLOCK = 512


@triton.jit(
    do_not_specialize=("step", "out_features", "has_scales"), do_not_specialize_on_alignment=("table", "scales")
)
def _decode_kernel(  # type: ignore[no-untyped-def]
    codes, table, scales, step, out, out_features, in_features, code_stride, out_stride, has_scales,
    FORM: tl.constexpr, BITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One tile of the weight, BLOCK_OUT × BLOCK_IN, in the dtype of ``out``; an int8 ``out`` takes no scales."""
    tile = tl.program_id(0)
    across = tl.cdiv(in_features, BLOCK_IN)
    column = (tile // across).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column_in = column < out_features
    first = (tile % across) * BLOCK_IN
    weights = decoded(codes, table, column, column_in, first, code_stride, in_features, FORM, BITS, BLOCK_OUT, BLOCK_IN)
    if out.dtype.element_ty != tl.int8:
        scale = tl.load(scales + column, mask=column_in & (has_scales != 0), other=1.0) * step
        weights = weights.to(tl.float32) * scale[:, None]
    place = first + tl.arange(0, BLOCK_IN)
    tl.store(
        out + column[:, None] * out_stride + place[None, :],
        weights.to(out.dtype.element_ty),
        mask=column_in[:, None] & (place < in_features)[None, :],
    )


@triton.jit(do_not_specialize=("count", "in_features", "out_stride", "added"))
def _correct_kernel(  # type: ignore[no-untyped-def]
    out, index, values, count, in_features, out_stride, added, BLOCK: tl.constexpr
):
    """Write corrections over decoded weights, or add them. No position occurs twice."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    position = tl.load(index + at, mask=inside, other=0)
    place = out + position // in_features * out_stride + position % in_features
    there = tl.load(place, mask=inside & (added != 0), other=0).to(tl.float32)
    value = there + tl.load(values + at, mask=inside, other=0.0)
    tl.store(place, value.to(out.dtype.element_ty), mask=inside)


def fill(out: Tensor, weight: CompressedWeight, tile: tuple[int, int], *, warps: int = 4) -> None:
    """Decode ``weight`` into ``out`` (out, in), dense rows: fp32, fp16 or bf16, scaled and corrected, in the rotated
    basis of the codes; or int8, levels alone. ``tile``: outputs and inputs of a tile, powers of two.
    """
    block_out, block_in = tile
    tiles = triton.cdiv(weight.out_features, block_out) * triton.cdiv(weight.columns, block_in)
    nothing = scratch_fp32(out.device)
    _decode_kernel[(tiles,)](
        weight.codes, weight.codes if weight.table is None else weight.table,
        nothing if weight.scales is None else weight.scales, weight.step, out,
        weight.out_features, weight.columns, weight.codes.stride(0), out.stride(0), int(weight.scales is not None),
        FORM=weight.form, BITS=weight.bits, BLOCK_OUT=block_out, BLOCK_IN=block_in, num_warps=warps,
    )  # fmt: skip
    if out.dtype == torch.int8 or weight.index is None or weight.values is None:
        return
    count = weight.index.numel()
    _correct_kernel[(triton.cdiv(count, _BLOCK),)](
        out, weight.index, weight.values, count, weight.columns, out.stride(0), int(weight.added),
        BLOCK=_BLOCK,
    )  # fmt: skip


def levels(weight: CompressedWeight, tile: tuple[int, int], *, warps: int = 4) -> CompressedWeight:
    """A weight that decodes to int8, decoded into scratch memory: a plain int8 matrix with the same scales."""
    if weight.form == LATTICE:
        return weight
    plain = torch.empty((weight.out_features, weight.columns), dtype=torch.int8, device=weight.codes.device)
    fill(plain, weight, tile, warps=warps)
    return CompressedWeight(
        LATTICE, 0, weight.columns, plain, scales=weight.scales, step=weight.step, index=weight.index,
        values=weight.values, added=weight.added,
    )  # fmt: skip
