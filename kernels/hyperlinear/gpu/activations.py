"""What happens to activations before a product: the Hadamard rotation of ``orbit``, and int8 with a scale a token.

A tile of 128 columns is turned by one product with a block-diagonal matrix of ±1, made in registers from the parity of
i & j (Sylvester's order); blocks of 4 to 128 columns share one compiled kernel. 16-bit activations are multiplied
exactly, sums are fp32, 1/√h comes last. ``orbit.rotated`` is the same by plain torch operations.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hyperlinear.gpu.product import INTERPRETED

_TILE = 128
_ROWS = 16


@triton.jit
def _hadamard(block, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """±1 where a column meets one of its block, else 0: fp32 (TILE, TILE)."""
    i = tl.arange(0, TILE)[:, None]
    j = tl.arange(0, TILE)[None, :]
    parity = (i % block) & (j % block)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where(i // block == j // block, 1.0 - 2.0 * (parity & 1).to(tl.float32), 0.0)


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    x, signs, row, row_in, first, columns, row_stride, block, norm,
    TILE: tl.constexpr, ROTATE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The tile of ``x`` from column ``first`` on, rotated where wanted: fp32."""
    place = first + tl.arange(0, TILE)
    inside = row_in[:, None] & (place < columns)[None, :]
    taken = tl.load(x + row[:, None] * row_stride + place[None, :], mask=inside, other=0.0)
    if ROTATE:
        sign = tl.load(signs + place, mask=place < columns, other=1)
        # Through fp32 and back, exactly: the interpreter does not multiply bf16 numbers.
        signed = taken.to(tl.float32) * sign.to(tl.float32)[None, :]
        if not WIDEN:
            signed = signed.to(taken.dtype)
        return tl.dot(signed, _hadamard(block, TILE).to(signed.dtype), input_precision="ieee") * norm
    else:
        return taken.to(tl.float32)


@triton.jit(do_not_specialize=("rows", "block", "norm"), do_not_specialize_on_alignment=("signs",))
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x, signs, out, rows, columns, row_stride, out_stride, block, norm,
    ROWS: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS × TILE activations."""
    tile = tl.program_id(0)
    across = tl.cdiv(columns, TILE)
    row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    first = (tile % across) * TILE
    turned = _turned(x, signs, row, row_in, first, columns, row_stride, block, norm, TILE, True, WIDEN)
    place = first + tl.arange(0, TILE)
    tl.store(
        out + row[:, None] * out_stride + place[None, :],
        turned.to(out.dtype.element_ty),
        mask=row_in[:, None] & (place < columns)[None, :],
    )


@triton.jit(do_not_specialize=("rows", "block", "norm"), do_not_specialize_on_alignment=("signs", "scales"))
def _quantise_kernel(  # type: ignore[no-untyped-def]
    x, signs, out, scales, rows, columns, row_stride, out_stride, block, norm,
    ROWS: tl.constexpr, TILE: tl.constexpr, ROTATE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: their largest first, then the quotients. A row with NaN or infinity gets NaN for its scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    largest = tl.zeros((ROWS,), dtype=tl.float32)
    broken = tl.zeros((ROWS,), dtype=tl.int32)
    for first in range(0, columns, TILE):
        taken = _turned(x, signs, row, row_in, first, columns, row_stride, block, norm, TILE, ROTATE, WIDEN)
        largest = tl.maximum(largest, tl.max(tl.abs(taken), 1))
        broken = tl.maximum(broken, tl.max(((tl.abs(taken) <= 3.4e38) == 0).to(tl.int32), 1))
    largest = tl.where(broken != 0, 0.0, largest)
    # The bound keeps the quotients of a row of zeros finite.
    scale = tl.maximum(largest, 1e-30) / 127.0
    for first in range(0, columns, TILE):
        taken = _turned(x, signs, row, row_in, first, columns, row_stride, block, norm, TILE, ROTATE, WIDEN)
        whole = tl.floor(tl.where(broken[:, None] != 0, 0.0, taken) / scale[:, None] + 0.5)
        whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
        place = first + tl.arange(0, TILE)
        tl.store(
            out + row[:, None] * out_stride + place[None, :],
            whole.to(tl.int8),
            mask=row_in[:, None] & (place < columns)[None, :],
        )
    tl.store(scales + row, tl.where(broken != 0, float("nan"), scale), mask=row_in)


def rotate(x: Tensor, block: int, signs: Tensor) -> Tensor:
    """``x`` (rows, in), dense rows, with its signs changed and each block of ``block`` columns turned, in its dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, columns = x.shape
    if out.numel():
        tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _TILE)
        _rotate_kernel[(tiles,)](
            x, signs, out, rows, columns, x.stride(0), out.stride(0), block, 1 / math.sqrt(block),
            ROWS=_ROWS, TILE=_TILE, WIDEN=_widen(x),
        )  # fmt: skip
    return out


def quantise(x: Tensor, block: int, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` (rows, in), dense rows, as int8 and a scale a row, fp32 (rows,): round(127·x / largest); rotated before,
    unless ``block`` is 1.
    """
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if out.numel():
        _quantise_kernel[(triton.cdiv(rows, _ROWS),)](
            x, out if signs is None else signs, out, scales, rows, columns, x.stride(0), out.stride(0),
            block, 1 / math.sqrt(block),
            ROWS=_ROWS, TILE=_TILE, ROTATE=block > 1, WIDEN=_widen(x),
        )  # fmt: skip
    return out, scales


def _widen(x: Tensor) -> bool:
    """Whether bf16 must be widened for Triton's interpreter; see ``product``."""
    return INTERPRETED and x.dtype == torch.bfloat16
