"""The product in whole numbers: int8 weights, activations quantised per token on the fly, int32 sums.

For many tokens on CPUs with dot-product instructions it takes about half as long as the one in bf16. Weights are the
codecs' own int8 levels; what a level does not give (far outliers) is added as a sparse second product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.hyperlinear import cpu_numba as loops
from kernels.hyperlinear.threads import over_rows

LEAST_ROWS = 64
"""Fewer tokens than these are left to the other product: decoding is most of their time."""
_AT_ONCE = 1024
"""Tokens whose int32 sums are held at once."""


@dataclass(frozen=True)
class Int8Weight:
    """``levels``: int8 (out, in). ``scales``: fp32 (out,). ``index``, ``extra``: flat positions, int64 (n,), and what
    is to be added there, fp32 (n,)."""

    levels: Tensor
    scales: Tensor
    index: Tensor
    extra: Tensor


def worth_it(x: Tensor) -> bool:
    """Whether int8 wins for ``x`` on this machine: many tokens on a CPU with dot-product instructions."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or x.shape[:-1].numel() < LEAST_ROWS:
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "dot_prod", "i8mm"))


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """``x`` (…, in) times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype."""
    out_features, columns = weight.levels.shape
    flat = x.reshape(-1, columns)
    out = torch.empty((flat.shape[0], out_features), dtype=x.dtype)
    added = torch.zeros(out_features) if bias is None else bias.float()
    size = min(_AT_ONCE, flat.shape[0])
    quantised = torch.empty((size, columns), dtype=torch.int8)
    scales = torch.empty(size)
    sums = torch.empty((size, out_features), dtype=torch.int32)
    wide = torch.empty((size, out_features))
    transposed = weight.levels.t()
    factors, offset = weight.scales.numpy(), added.numpy()
    starts = torch.searchsorted(weight.index, torch.arange(out_features + 1) * columns).numpy()
    places, extra = (weight.index % columns).numpy(), weight.extra.numpy()
    for start in range(0, flat.shape[0], size):
        part = flat[start : start + size].float().contiguous()
        rows = len(part)
        work = _Part(*(t.numpy() for t in (part, quantised, scales, sums, wide)))
        over_rows(work.quantise, rows, columns)
        torch._int_mm(quantised[:rows], transposed, out=sums[:rows])
        over_rows(partial(work.finish, factors, offset, starts, places, extra), rows, out_features)
        out[start : start + rows] = wide[:rows]
    return out.view(*x.shape[:-1], out_features)


class _Part(NamedTuple):
    """Some tokens on their way: ``x`` fp32, its int8 form and the scales that undo it, int32 sums, the result."""

    x: NDArray[np.float32]
    quantised: NDArray[np.int8]
    scales: NDArray[np.float32]
    sums: NDArray[np.int32]
    out: NDArray[np.float32]

    def quantise(self, first: int, last: int) -> None:
        loops.quantise(self.x[first:last], self.quantised[first:last], self.scales[first:last])

    def finish(
        self, factors: NDArray[np.float32], bias: NDArray[np.float32], starts: NDArray[np.int64],
        columns: NDArray[np.int64], extra: NDArray[np.float32], first: int, last: int,
    ) -> None:  # fmt: skip
        loops.finish(self.sums[first:last], self.scales[first:last], factors, bias, self.out[first:last])
        if len(extra):
            loops.add_sparse(self.x[first:last], starts, columns, extra, self.out[first:last])
