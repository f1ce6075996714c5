"""The product block by block: decode a few output rows into a scratch buffer, multiply, go on.

The scratch memory is bounded whatever the layer's size, and small enough to stay in the cache between its
decoding and the library's product. A block is decoded once a call, however many tokens there are. On CPUs the decoders
are compiled loops; ``blockwise`` itself is not particular to CPUs and also serves devices and dtypes without a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.hyperlinear import cpu_numba as loops
from kernels.hyperlinear.cpu_int8 import Int8Weight
from kernels.hyperlinear.naive import accumulator
from kernels.hyperlinear.threads import over_rows

#: Decoded weights held at once, in bytes; one row more where a row alone takes more.
SCRATCH_BYTES = 4 << 20

Rows = Callable[[int, int], Tensor]
"""Decodes the output rows from the first number up to the second: (rows, in), good until the next call."""


@functools.cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers by instructions of its own."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def operand(x: Tensor) -> torch.dtype:
    """The dtype that both factors have: bf16 for a bf16 ``x`` where the CPU has it, else the accumulator's."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and native_bf16():
        return torch.bfloat16
    return accumulator(x)


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

    Sums are fp32 (float64 for a float64 ``x``), rounded once to ``x``'s dtype; factors as ``operand`` has it. ``out``:
    where to write, (rows of x, out), contiguous, of ``operand``'s dtype.
    """
    out_features, points = indices.shape
    on_cpu = x.device.type == "cpu"
    kind = torch.bfloat16 if operand(x) == torch.bfloat16 else torch.float32
    block = rows_at_once(out_features, points * 2 * kind.itemsize, scratch_bytes)
    decoded = torch.empty((block, 2 * points), dtype=kind, device=x.device)
    halves = kind == torch.bfloat16
    table = pairs.view(torch.float32).to(kind).view(torch.int32) if halves else pairs

    def rows(start: int, stop: int) -> Tensor:
        weight = decoded[: stop - start]
        if on_cpu:
            gather_rows(indices[start:stop], table, weight)
        else:
            weight.view(torch.int64).copy_(table[indices[start:stop].long()])
        return weight[:, : x.shape[-1]]

    return blockwise(x, rows, out_features, block, bias, out=out)


def rows_at_once(out_features: int, row_bytes: int, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """How many output rows to decode at once: as many as fit, at least one, in blocks of about the same size."""
    fit = max(1, scratch_bytes // max(1, row_bytes))
    return max(1, -(-out_features // -(-out_features // fit))) if out_features else 1


def blockwise(
    x: Tensor, rows: Rows, out_features: int, block: int, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """``x`` (…, in) times a weight that ``rows`` decodes ``block`` output rows at a time, plus ``bias``."""
    kind = operand(x)
    if out is None and block >= out_features > 0 and x.numel():
        return F.linear(x.to(kind), rows(0, out_features).to(kind), None if bias is None else bias.to(kind)).to(x.dtype)
    flat = x.reshape(-1, x.shape[-1]).to(kind)
    if out is None:
        out = torch.empty((flat.shape[0], out_features), dtype=kind, device=x.device)
    if bias is not None:
        bias = bias.to(kind)
    for start in range(0, out_features if flat.shape[0] else 0, block):
        stop = min(start + block, out_features)
        weight, target = rows(start, stop).to(kind).t(), out[:, start:stop]
        if bias is None:
            torch.mm(flat, weight, out=target)
        else:
            torch.addmm(bias[start:stop], flat, weight, out=target)
    return out.view(*x.shape[:-1], out_features).to(x.dtype)


def scale_rows(levels: Tensor, scales: Tensor, out: Tensor) -> None:
    """Fill ``out`` (rows, columns), fp32 or bf16, with int8 ``levels`` times fp32 ``scales`` (rows,)."""
    source, factors, target = levels.numpy(), scales.numpy(), array(out)
    loop: Callable[..., None] = loops.to_bf16 if out.dtype == torch.bfloat16 else loops.to_fp32
    over_rows(lambda a, b: loop(source[a:b], factors[a:b], target[a:b]), *levels.shape)


def gather_rows(indices: Tensor, table: Tensor, out: Tensor) -> None:
    """Fill ``out`` (rows, 2·points) with the pairs that int16 ``indices`` (rows, points) name in ``table`` (n,), whose
    entries are as wide as two of ``out``'s."""
    source, entries = indices.numpy(), table.numpy()
    target = out.view(table.dtype).numpy()
    gathers: dict[int, Callable[..., None]] = {2: loops.gather16, 4: loops.gather32, 8: loops.gather64}
    loop = gathers[table.element_size()]
    over_rows(lambda a, b: loop(source[a:b], entries, target[a:b]), *indices.shape)


def array(tensor: Tensor) -> NDArray[np.generic]:
    """The tensor's memory as numpy has it: bf16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        found: NDArray[np.generic] = tensor.view(torch.int16).numpy().view(np.uint16)
        return found
    return tensor.numpy()


def int8_weight(indices: Tensor, pairs: Tensor, in_features: int) -> Int8Weight:
    """A birkhoff weight rounded to 255 steps of its largest."""
    values = pairs.view(torch.float32)
    step = (values.abs().amax() / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    table = (values / step).round_().to(torch.int8).view(torch.int16)
    levels = torch.empty((indices.shape[0], 2 * indices.shape[1]), dtype=torch.int8)
    gather_rows(indices, table, levels)
    none = torch.empty(0)
    return Int8Weight(levels[:, :in_features].contiguous(), step.expand(len(levels)).contiguous(), none.long(), none)
