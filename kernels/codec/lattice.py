"""The codec for storage: levels of one step a tensor, entropy-coded by rANS under tables that ship as data.

ŵ = offset + Δ·q with q = round((w − offset)/Δ). A row's class, one byte, tells its spread; with the tensor's shape β it
names the frequency table that the row's levels are coded with. What no table codes escapes: it is stored as it is.
``lattice_naive`` is the same as it is written down, the oracle. docs/codec-v1.md has the format.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.codec import lattice_numba, rans
from kernels.codec.lattice_format import LatticeTensor, Parts, check_arguments
from kernels.codec.lattice_tables import COST_BITS, LOWEST, costs_of_all, table

#: The shape whose costs decide between two classes of a sampled row, before the tensor's own is chosen.
_MIDDLE_BETA = 3
# Weights in a sample, and the fewest columns of it. The shape is judged on long pieces of rows: a class fitted to few
# weights hides their tails. A size is judged on many rows, because rows differ most.
_FOR_BETA = (1 << 16, 256)
_FOR_ESTIMATE = (1 << 18, 32)
_CHUNK = 16


@dataclass(frozen=True)
class Estimate:
    """What coding would cost. ``bits``: of the stream, everything counted. ``squared_error``: Σ(w − ŵ)²."""

    bits: float
    squared_error: float
    beta: int


@dataclass(frozen=True, eq=False)
class Corrections:
    """The weights that no level gives. ``index``: flat positions, int64 (n,), ascending. ``values``: fp32 (n,)."""

    index: Tensor
    values: Tensor


def encode(weight: Tensor, step: float, *, columns: int, offset: float = 0.0, beta: int | None = None) -> LatticeTensor:
    """Code a tensor as rows of ``columns`` weights.

    ``step`` and ``offset`` are rounded to fp32. ``beta``: index into ``BETAS``; None: the cheapest, by the tables'
    costs on a sample. Weights are read as fp32. Raises ValueError for NaN and infinity (in fp32), for a step that is
    not a normal fp32 number (as that of a tensor of subnormals would be), for an empty tensor or one that is
    not of a floating dtype, and for columns that do not divide the weights.
    """
    step, offset = _fp32("step", step), _fp32("offset", offset)
    check_arguments(tuple(weight.shape), weight.dtype, columns, step, offset, 0 if beta is None else beta)
    if beta is None:
        beta = cheapest(sample(weight, columns, *_FOR_BETA), step, offset, weight.dtype)[0]
    matrix = _matrix(weight, columns)
    made = table(beta)
    levels = np.empty(matrix.shape, dtype=np.int8)
    classes = np.empty(len(matrix), dtype=np.int8)
    escapes = lattice_numba.quantise(
        matrix, np.float32(step), np.float32(offset), largest(weight.dtype), LOWEST, made.cost, made.limit,
        levels, classes,
    )  # fmt: skip
    values = matrix.reshape(-1)[_positions(levels, escapes)]
    parts = Parts(classes, rans.encode(levels, classes, made), values)
    return LatticeTensor(tuple(weight.shape), weight.dtype, columns, step, offset, beta, parts.data())


def estimate(weight: Tensor, step: float, *, columns: int, offset: float = 0.0) -> Estimate:
    """What ``encode`` would give, without making the stream, from a sample of about 2^19 weights of a larger tensor.

    Raises as ``encode`` does, but sees no NaN outside the sample.
    """
    step, offset = _fp32("step", step), _fp32("offset", offset)
    check_arguments(tuple(weight.shape), weight.dtype, columns, step, offset, 0)
    beta = cheapest(sample(weight, columns, *_FOR_BETA), step, offset, weight.dtype)[0]
    taken = sample(weight, columns, *_FOR_ESTIMATE)
    _, cost, squared_error = cheapest(taken, step, offset, weight.dtype, beta)
    part = taken.shape[1]
    if part < columns:
        # A class fitted to the m weights it is used for saves K/m a weight. Halves of rows tell K; whole rows save
        # K/columns.
        halved = cheapest(taken.reshape(-1, part // 2), step, offset, weight.dtype, beta)[1]
        cost += (cost - halved) * (1 - part / columns)
    scale = weight.numel() / taken.size
    return Estimate(side_bits(weight.numel() // columns, columns) + scale * cost, scale * squared_error, beta)


def levels(encoded: LatticeTensor) -> tuple[Tensor, Corrections]:
    """The form for memory: levels, int8 (rows, columns), and the weights that they do not give.

    Where a weight is stored as it is the level is the nearest one from −127 to 127. Raises ValueError for a stream
    that does not decode.
    """
    found, index, values = _decoded(encoded)
    found.reshape(-1)[index] = encoded.nearest(values)
    return torch.from_numpy(found), Corrections(torch.from_numpy(index), torch.from_numpy(values))


def decode(encoded: LatticeTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor on the CPU, in the source's dtype unless another is given.

    fp32(offset + fp32(Δ·q)), or the value that was stored; then one cast. Raises ValueError for a stream that does
    not decode.
    """
    found, index, values = _decoded(encoded)
    dense = np.empty(found.size, dtype=np.float32)
    lattice_numba.dense(found.reshape(-1), np.float32(encoded.step), np.float32(encoded.offset), dense)
    dense[index] = values
    return torch.from_numpy(dense).view(encoded.shape).to(dtype or encoded.dtype)


def _decoded(encoded: LatticeTensor) -> tuple[NDArray[np.int8], NDArray[np.int64], NDArray[np.float32]]:
    """Levels, −128 where a weight is stored as it is; the flat positions of those, and their values."""
    parts = encoded.parts()
    found = rans.decode(parts.segments, parts.classes, encoded.columns, table(encoded.beta))
    return found, _positions(found, parts.escapes.size), parts.escapes


def _positions(found: NDArray[np.int8], count: int) -> NDArray[np.int64]:
    """Where −128 stands, ``count`` times; else ValueError."""
    index = np.empty(count, dtype=np.int64)
    there = lattice_numba.find(found.reshape(-1), index)
    if there != count:
        raise ValueError(f"the levels name {there} escapes, but there are {count}")
    return index


def side_bits(rows: int, columns: int) -> int:
    """Bits of a stream beyond what its symbols cost: classes, counts and states.

    Of each state's 32 bits 8 are information, on average: it lies anywhere between 2^16 and 2^32, by its logarithm.
    """
    segments, lanes = rans.segment_count(rows, columns), rans.lane_count(rows, columns)
    return 8 * rows + segments * (32 + 32 * lanes - 8 * min(lanes, columns))


def largest(dtype: torch.dtype) -> np.float32:
    """The largest magnitude that a decoded weight may have: what both fp32 and the source's dtype hold."""
    return np.float32(min(torch.finfo(dtype).max, torch.finfo(torch.float32).max))


def cheapest(
    matrix: NDArray[np.float32], step: float, offset: float, dtype: torch.dtype, beta: int | None = None
) -> tuple[int, float, float]:
    """The shape that codes a sample in the fewest bits (the first of equals), those bits, and the squared error.

    ``beta``: the shape, where it is known.

    The bits are of symbols and escapes. Costs are whole numbers, so the choice is the same on every machine.
    """
    costs = costs_of_all()
    counts = np.zeros(costs.shape[1:], dtype=np.int64)
    squared_error = lattice_numba.histogram(
        matrix, np.float32(step), np.float32(offset), largest(dtype), LOWEST, costs[_MIDDLE_BETA], counts
    )
    shapes = range(len(costs)) if beta is None else (beta,)
    bits, best = min((int((counts * costs[shape]).sum()), shape) for shape in shapes)
    return best, bits / (1 << COST_BITS), squared_error


def sample(weight: Tensor, columns: int, count: int, least_columns: int) -> NDArray[np.float32]:
    """About ``count`` weights of a larger tensor as rows, fp32: of count / least_columns rows, chunks of columns.

    Chunks of 16 are spread over the columns, in other places from row to row. Small tensors are taken whole. Raises
    ValueError for NaN and infinity among them.
    """
    places = _places(weight.numel() // columns, columns, count, least_columns)
    if places is None:
        return _matrix(weight, columns)
    starts, width = places
    flat = weight.detach().cpu().reshape(-1)
    # numpy has no bfloat16.
    numbers = flat.view(torch.int16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
    taken = np.lib.stride_tricks.sliding_window_view(numbers, width)[starts].reshape(len(starts), -1)
    return _matrix(torch.from_numpy(taken).view(flat.dtype), taken.shape[1])


@functools.lru_cache(maxsize=8)
def _places(rows: int, columns: int, count: int, least_columns: int) -> tuple[NDArray[np.int64], int] | None:
    """Where the chunks of a sample start, flat, int64 (rows, chunks) of it, and their width; None: all is taken."""
    if rows * columns <= count:
        return None
    some_rows = min(rows, count // least_columns)
    chunks = -(-count // (some_rows * _CHUNK))
    whole = 2 * chunks * _CHUNK > columns
    if whole:
        some_rows = min(rows, max(some_rows, count // columns))
    row = np.arange(some_rows, dtype=np.int64)[:, None]
    first = (row * rows // some_rows) * columns
    if whole:
        return None if some_rows == rows else (first, columns)
    shift = row * 40503 % 65536
    chunk = np.arange(chunks, dtype=np.int64)[None, :]
    return first + (chunk * 65536 + shift) * (columns - _CHUNK) // (chunks * 65536), _CHUNK


def _matrix(weight: Tensor, columns: int) -> NDArray[np.float32]:
    """The weights in rows, fp32 on the CPU. Raises ValueError for NaN and infinity."""
    flat = weight.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy()
    if not lattice_numba.finite(flat):
        raise ValueError("weights must be finite numbers that fp32 holds")
    return flat.reshape(-1, columns)


def _fp32(name: str, number: float) -> float:
    """The nearest fp32 number."""
    if not (math.isfinite(number) and abs(number) <= float(np.finfo(np.float32).max)):
        raise ValueError(f"{name} must be a number that fp32 holds, not {number!r}")
    return float(np.float32(number))


__all__ = ["Corrections", "Estimate", "LatticeTensor", "decode", "encode", "estimate", "levels"]
