"""``orbit`` by torch operations, on any device: decoding, and the encoder's search over all rows at once.

The same integers as on the CPU: equal codes and levels. One step of the search handles one column of all rows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.codec.hadamard import rotate
from kernels.codec.orbit_rows import Plan
from kernels.codec.orbit_tables import table
from kernels.codec.trellis_numba import FRACTION, LIMIT

# Candidates (rows × 2^k × 2^k) of one step that are held at once.
_CANDIDATES = 1 << 26
_DECODED = 1 << 24


def levels(codes: Tensor, k: int, law: int, columns: int) -> Tensor:
    """The levels T[σ], int8 (rows, columns), of digits (uint8 (rows, ⌈columns·k/8⌉)), on their device."""
    values = torch.from_numpy(table(k, law).levels.copy()).to(codes.device)
    # A byte before and two after, so that every window of 2k bits lies within three bytes.
    start = (torch.arange(columns, device=codes.device) - 1) * k + 8
    first = start >> 3
    shift = (24 - 2 * k - (start & 7)).to(torch.int32)
    found = torch.empty((codes.shape[0], columns), dtype=torch.int8, device=codes.device)
    step = max(1, _DECODED // columns)
    for row in range(0, codes.shape[0], step):
        wide = torch.nn.functional.pad(codes[row : row + step].to(torch.int32), (1, 2))
        window = (wide << 16)[:, :-2] | (wide << 8)[:, 1:-1] | wide[:, 2:]
        states = (window.index_select(1, first) >> shift) & ((1 << 2 * k) - 1)
        found[row : row + step] = values[states.long()]
    return found


def encode_rows(x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Code rows, on their device: digits before packing, uint8 (rows, columns), row scales, float64 (rows,) on the CPU,
    and where outliers are, bool (rows, columns).

    ``x``: fp32 (rows, columns), scaled so that the largest is under 2, as ``orbit.encode`` scales it.
    """
    tables = table(k, plan.law)
    if plan.block > 1:
        x = rotate(x, plan.block, plan.seed)
    spread = _rms(x)
    apart = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    if plan.threshold < math.inf:
        apart = x.abs().to(torch.float64) > _column(plan.threshold * spread, x)
        x = x.masked_fill(apart, 0)
        spread = _rms(x)
    begin = spread * tables.start / (1 << FRACTION)
    up = np.divide(1.0, begin, out=np.zeros_like(begin), where=begin > 0)
    whole = (x.to(torch.float64) * _column(up, x)).round().to(torch.int32)
    step = max(1, _CANDIDATES >> 2 * k)
    codes = torch.cat([_search(part, k, plan.law) for part in whole.split(step)])
    codes[torch.from_numpy(begin == 0).to(x.device)] = 0
    values = torch.from_numpy(tables.levels.copy()).to(x.device)
    before = torch.nn.functional.pad(codes[:, :-1], (1, 0)).long()
    level = values[(before << k) | codes].to(torch.int64)
    cross, power = ((factor * level).sum(dim=1).cpu().numpy() for factor in (whole, level))
    return codes, torch.from_numpy(np.maximum(cross, 0) / np.maximum(power, 1) * begin), apart


def _column(values: NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)[:, None]


def _rms(x: Tensor) -> NDArray[np.float64]:
    """Root mean square of 15-bit integers, float64 (rows,); see ``trellis_numba.rms``.

    What is one number a row is done by numpy: torch's roots and quotients are not correctly rounded everywhere.
    """
    _, exponent = np.frexp(x.abs().amax(dim=1).cpu().numpy().astype(np.float64))
    up = np.ldexp(1.0, 15 - exponent)
    whole = (x.to(torch.float64) * _column(up, x)).round().to(torch.int64)
    total = (whole * whole).sum(dim=1).cpu().numpy()
    return np.asarray(np.sqrt(total / x.shape[1]) / up)


def _search(x: Tensor, k: int, law: int) -> Tensor:
    """The symbols of the best path of each row of ``x`` (int32 (rows, columns)): uint8, of its shape."""
    tables = table(k, law)
    rows, columns = x.shape
    symbols = 1 << k
    slopes = torch.from_numpy(tables.slopes.copy()).to(x.device)
    bases = torch.from_numpy(tables.bases.copy()).to(x.device)
    mask = symbols - 1
    back = torch.empty((columns, rows, symbols), dtype=torch.uint8, device=x.device)
    kept = x.clamp(-LIMIT, LIMIT).t().contiguous()
    cost = torch.zeros((rows, symbols), dtype=torch.int32, device=x.device)
    for column in range(columns):
        v = kept[column]
        if column == 0:
            new = bases[:, 0] - v[:, None] * slopes[:, 0]
        else:
            new = (cost[:, None, :] + (bases - v[:, None, None] * slopes)).amin(dim=2)
        back[column] = (new & mask).to(torch.uint8)
        new = new & ~mask
        cost = new - new.amin(dim=1, keepdim=True)
    # The first of equal costs: argmin does not promise it, so the symbol goes into the lowest bits.
    packed = cost | torch.arange(symbols, dtype=torch.int32, device=x.device)
    state = (packed.amin(dim=1) & mask).to(torch.int64)[:, None]
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=x.device)
    for column in range(columns - 1, -1, -1):
        codes[:, column] = state[:, 0].to(torch.uint8)
        state = back[column].gather(1, state).to(torch.int64)
    return codes
