"""The product with an ``orbit`` weight: a table look-up a weight, a scale a row, a rotation of the activations.

A row's codes are a bit string; the window of 2k bits that ends with a weight's own k is the weight's place in
the table. Rotating ``x`` instead of the weight is what lets the codes stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kernels.codec import trellis_numba as trellis
from kernels.codec.hadamard import butterflies, norm
from kernels.hyperlinear.cpu import SCRATCH_BYTES, blockwise, operand, rows_at_once, scale_rows
from kernels.hyperlinear.cpu_int8 import Int8Weight
from kernels.hyperlinear.lattice import block_bounds
from kernels.hyperlinear.threads import over_rows


@dataclass(frozen=True)
class Weight:
    """A compressed (out, in) weight.

    ``codes``: uint8 (out, ⌈in·bits / 8⌉), the most significant bit first. ``bits``: k. ``table``: int8 (4^k,).
    ``scales``: int32 (out,), the bits of fp32 numbers. ``block``: h of the Hadamard rotation, 1 for none.
    ``signs``: int8 (in,), ±1, those of the rotation. ``index``: int64 (n,), ascending, the flat positions of
    the outliers; ``values``: int32 (n,), the bits of what is added there, fp32.
    """

    codes: Tensor
    bits: int
    table: Tensor
    scales: Tensor
    block: int
    signs: Tensor
    index: Tensor
    values: Tensor

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.signs.shape[0]

    def levels(self, start: int, stop: int, out: Tensor) -> None:
        """Write the integer levels of output rows to the first rows of ``out``, int8 (rows or more, in), on the CPU."""
        codes, table, target = self.codes[start:stop].numpy(), self.table.numpy(), out.numpy()
        over_rows(lambda a, b: trellis.levels(codes, self.bits, table, a, b, target), stop - start, self.columns)

    def rows(self, start: int, stop: int) -> Tensor:
        """Output rows as they are before the rotation is undone and outliers are added: fp32 (rows, in)."""
        symbols = unpack(self.codes[start:stop], self.bits, self.columns)
        states = symbols.clone()
        states[:, 1:] |= symbols[:, :-1] << self.bits
        levels = self.table.to(torch.float32).index_select(0, states.view(-1)).view(states.shape)
        return levels.mul_(self.scales[start:stop].view(torch.float32)[:, None])


def unpack(codes: Tensor, bits: int, columns: int) -> Tensor:
    """The symbols of ``bits`` bits in each row of bytes: int32 (rows, columns)."""
    rows = codes.shape[0]
    groups = -(-columns // 8)  # of eight symbols, which fill ``bits`` whole bytes
    wide = torch.zeros((rows, groups * bits), dtype=torch.int32, device=codes.device)
    wide[:, : codes.shape[1]] = codes
    grouped = wide.view(rows, groups, bits)
    out = torch.empty((rows, groups, 8), dtype=torch.int32, device=codes.device)
    mask = (1 << bits) - 1
    for number in range(8):
        first, last = number * bits // 8, (number * bits + bits - 1) // 8
        value = grouped[:, :, first]
        if last > first:
            value = value << 8 | grouped[:, :, last]
        out[:, :, number] = value >> ((last + 1) * 8 - (number + 1) * bits) & mask
    return out.view(rows, groups * 8)[:, :columns].contiguous()


def dense(weight: Weight) -> Tensor:
    """The weight: fp32 (out, in), the rotation undone as the codec undoes it."""
    made = weight.rows(0, weight.codes.shape[0])
    if weight.block > 1:
        made = butterflies(made, weight.block) * float(norm(weight.block)) * weight.signs
    if weight.index.numel():
        made.view(-1).index_add_(0, weight.index, weight.values.view(torch.float32))
    return made


def linear(x: Tensor, weight: Weight, bias: Tensor | None, *, scratch_bytes: int = SCRATCH_BYTES) -> Tensor:
    """``x`` (…, in) times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype."""
    out_features, columns = weight.codes.shape[0], weight.columns
    # Either the activations are rotated or the weight's rotation is undone, whichever has fewer rows.
    undo = x.device.type == "cpu" and x.dtype != torch.float64 and weight.block > 1
    undo = undo and out_features < x.shape[:-1].numel()
    turned = x if undo else rotated(x, weight.block, weight.signs)
    if x.device.type != "cpu":
        extra = weight.values.view(torch.float32)

        def whole(start: int, stop: int) -> Tensor:
            made = weight.rows(start, stop)
            made.view(-1).index_add_(0, weight.index, extra)
            return made

        return blockwise(turned, whole, out_features, out_features, bias).to(x.dtype)
    kind = torch.bfloat16 if operand(turned) == torch.bfloat16 else torch.float32
    block = rows_at_once(out_features, columns * kind.itemsize, scratch_bytes)
    levels = torch.empty((block, columns), dtype=torch.int8)
    scratch = torch.empty((block, columns), dtype=kind)
    bounds = block_bounds(weight.index, out_features, columns, block)

    def rows(start: int, stop: int) -> Tensor:
        made = scratch[: stop - start]
        span = slice(bounds[start // block], bounds[start // block + 1])
        _fill(weight, start, stop, span, levels, made)
        return turned_back(made, weight.block, weight.signs) if undo else made

    return blockwise(turned, rows, out_features, block, bias).to(x.dtype)


def transposed(x: Tensor, weight: Weight) -> Tensor:
    """``x`` (…, out) times the weight: (…, in) in ``x``'s dtype, on the CPU. The product is turned back, not the
    weight."""
    out_features, columns = weight.codes.shape[0], weight.columns
    levels = torch.empty((out_features, columns), dtype=torch.int8)
    weight.levels(0, out_features, levels)
    made = torch.empty((out_features, columns))
    _fill(weight, 0, out_features, slice(0, len(weight.index)), levels, made)
    return turned_back(x @ made.to(x.dtype), weight.block, weight.signs)


def _fill(weight: Weight, start: int, stop: int, span: slice, levels: Tensor, out: Tensor) -> None:
    """Write output rows to ``out`` (rows, in), still rotated or else with their outliers, never both, which are those
    of ``span``; ``levels``, int8 (rows or more, in), is scratch memory."""
    weight.levels(start, stop, levels)
    scale_rows(levels[: stop - start], weight.scales[start:stop].view(torch.float32), out)
    if span.start < span.stop:
        values = weight.values[span].view(torch.float32).to(out.dtype)
        out.view(-1).index_add_(0, weight.index[span] - start * weight.columns, values)


def turned_back(x: Tensor, block: int, signs: Tensor) -> Tensor:
    """The inverse of ``rotated``, in ``x``'s dtype."""
    if block == 1:
        return x
    turned: Tensor = x.unflatten(-1, (-1, block)) @ hadamard(block).to(x)
    return turned.flatten(-2) * signs


def rotated(x: Tensor, block: int, signs: Tensor) -> Tensor:
    """``x`` (…, n) with its signs changed and each block of ``block`` turned, in ``operand``'s dtype."""
    if block == 1:
        return x
    wide = x.to(operand(x))
    blocks = (wide * signs).unflatten(-1, (-1, block))
    turned: Tensor = blocks @ hadamard(block).to(blocks)
    return turned.flatten(-2)


@lru_cache(maxsize=16)
def hadamard(size: int) -> Tensor:
    """Sylvester's matrix in natural order over the root of its size: orthogonal and symmetric, float64."""
    made = torch.ones((1, 1), dtype=torch.float64)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / math.sqrt(size)


def int8_weight(weight: Weight) -> Int8Weight:
    """The levels, still rotated where they are; outliers are added."""
    out_features = weight.codes.shape[0]
    levels = torch.empty((out_features, weight.columns), dtype=torch.int8)
    weight.levels(0, out_features, levels)
    return Int8Weight(levels, weight.scales.view(torch.float32), weight.index, weight.values.view(torch.float32))
