"""The codec ``orbit``: a row of weights is one number of k·n binary digits, whose orbit under a shift is the weights.

Encoding is an exact Viterbi search over the orbit's states (``trellis_numba``), then least squares for the row's scale.
Rows are rotated, or a few weights are kept apart, or neither: what costs the fewest bits for its error on a sample.
``orbit_naive`` gives the same codes by plain loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.codec import trellis_numba as trellis
from kernels.codec.hadamard import norm, signs
from kernels.codec.orbit_format import OrbitTensor, Outliers, row_bytes, saturate
from kernels.codec.orbit_rows import (
    DEFAULT_SEED,
    OUTLIER_BITS,
    SAMPLE_ROWS,
    Matrix,
    Plan,
    Rows,
    choose,
    each,
    encode_rows,
)
from kernels.codec.orbit_tables import table

_ESTIMATE_SAMPLE = 1 << 18
_AT_ONCE = 1 << 20
_IN_CACHE = 1 << 16


@dataclass(frozen=True)
class Estimate:
    """What coding a tensor would give: ``bits`` in all, with side information, ``squared_error`` Σ(w − ŵ)²."""

    bits: float
    squared_error: float
    plan: Plan


def encode(
    weight: Tensor, k: int, *, columns: int, law: int | None = None, rotate: bool | None = None,
    outliers: float = 0.003, seed: int = DEFAULT_SEED, threads: int = 1,
) -> OrbitTensor:  # fmt: skip
    """Code a tensor of any shape as rows of ``columns`` weights, ``k`` bits each (3 … 6).

    ``law``: index into ``LAWS``, None for the best on a sample. ``rotate``: None for the best of rotating, keeping
    outliers apart and neither; True rotates where ``columns`` has a factor 4 and else keeps outliers apart; False
    keeps them apart. ``outliers``: the share of weights kept apart, 0 for none. ``threads``: cores to use.
    float64 is read as fp32.

    Raises ValueError for NaN or infinity (as fp32), another dtype, or columns that do not divide the tensor.
    """
    matrix = Matrix.of(weight, columns)
    plan = choose(matrix, k, law, rotate, outliers, seed)
    return encode_planned(weight, k, plan, columns=columns, threads=threads, _matrix=matrix)


def encode_planned(
    weight: Tensor, k: int, plan: Plan, *, columns: int, threads: int = 1, _matrix: Matrix | None = None
) -> OrbitTensor:
    """Code a tensor by a given plan; see ``encode``."""
    matrix = _matrix or Matrix.of(weight, columns)
    rows = encode_rows(matrix, k, plan, threads=threads)
    exponent, scales = half_scales(rows.scales, matrix.exponent)
    positions = _positions(matrix, rows)
    return OrbitTensor(
        shape=tuple(weight.shape), dtype=weight.dtype, columns=columns, k=k, law=plan.law, block=plan.block,
        seed=plan.seed, exponent=exponent, scales=torch.from_numpy(scales), codes=torch.from_numpy(rows.codes),
        outliers=_outliers(matrix, rows.codes, scales, exponent, positions, k, plan.law),
    )  # fmt: skip


def estimate(
    weight: Tensor, k: int, *, columns: int, law: int | None = None, rotate: bool | None = None,
    outliers: float = 0.003, seed: int = DEFAULT_SEED,
) -> Estimate:  # fmt: skip
    """What ``encode`` would give, from coding a sample of rows. Raises ValueError as it does."""
    matrix = Matrix.of(weight, columns)
    plan = choose(matrix, k, law, rotate, outliers, seed)
    total = matrix.weight.shape[0]
    wanted = min(total, max(SAMPLE_ROWS, _ESTIMATE_SAMPLE // columns))
    # Not more than a few rows of a tensor of very long ones.
    wanted = max(1, min(wanted, 4 * _ESTIMATE_SAMPLE // columns))
    chosen = np.arange(wanted) * total // wanted
    part = Matrix(matrix.weight[chosen], matrix.exponent)
    rows = encode_rows(part, k, plan, errors=True)
    energy, sampled = (_energy(source) for source in (matrix, part))
    error = float(rows.errors.sum()) * (energy / sampled if sampled else 0.0) * 4.0**matrix.exponent
    apart = float(rows.counts.sum()) * total / wanted
    bits = 8.0 * total * (row_bytes(columns, k) + 2) + OUTLIER_BITS * apart
    return Estimate(bits, error, plan)


def half_scales(scales: NDArray[np.float64], exponent: int) -> tuple[int, NDArray[np.float16]]:
    """The exponent of the unit and the scales in that unit, fp16; ``scales`` are in units of 2^``exponent``.

    The largest lies in [2^14, 2^15), so that those down to 2^−28 of it keep eleven bits.
    """
    _, largest = math.frexp(float(scales.max()))
    return exponent + largest - 15, np.ldexp(scales, 15 - largest).astype(np.float16)


def _energy(matrix: Matrix) -> float:
    """Σ w² of the scaled weights."""
    total = 0.0
    for part in np.array_split(matrix.weight, max(1, matrix.weight.size // _AT_ONCE)):
        scaled = part.astype(np.float64) * float(matrix.scale)
        total += float(np.vdot(scaled, scaled))
    return total


def _positions(matrix: Matrix, rows: Rows) -> NDArray[np.int64]:
    starts = np.concatenate(([0], np.cumsum(rows.counts)))
    positions = np.empty(int(starts[-1]), np.int64)
    if len(positions):
        trellis.collect(matrix.weight, matrix.scale, rows.threshold, starts, 0, len(rows.counts), positions)
    return positions


def _outliers(
    matrix: Matrix, codes: NDArray[np.uint8], scales: NDArray[np.float16], exponent: int, positions: NDArray[np.int64],
    k: int, law: int,
) -> Outliers:  # fmt: skip
    """The outliers at ``positions``, as what must be added to what is decoded there."""
    columns = matrix.weight.shape[1]
    level = np.empty(len(positions), np.int8)
    trellis.at_positions(codes, k, table(k, law).levels, columns, positions, level)
    decoded = _shift(torch.from_numpy(scales[positions // columns].astype(np.float32) * level), exponent)
    missing = matrix.weight.reshape(-1)[positions].astype(np.float64) - decoded.numpy()
    return outliers_of(positions, missing)


def outliers_of(positions: NDArray[np.int64], missing: NDArray[np.float64]) -> Outliers:
    """Outliers that add ``missing``: halves in a unit that fits the largest, or fp32 where small ones would suffer."""
    if not len(positions):
        return Outliers()
    size = np.abs(missing)
    _, largest = math.frexp(float(size.max()))
    exponent = largest - 15
    unit = 2.0**exponent
    if bool(((size > 0) & (size < unit * 2.0**-14)).any()):
        return Outliers(torch.from_numpy(positions), saturate(torch.from_numpy(missing), torch.float32), 0)
    return Outliers(torch.from_numpy(positions), torch.from_numpy((missing / unit).astype(np.float16)), exponent)


def _shift(x: Tensor, exponent: int) -> Tensor:
    """fp32(x·2^exponent), rounded once and kept to fp32's range."""
    if -126 <= exponent <= 127:  # the factor is an fp32 itself
        limit = torch.finfo(torch.float32).max
        return (x * 2.0**exponent).clamp_(-limit, limit)
    return saturate(x.to(torch.float64) * 2.0**exponent, torch.float32)


def codes_to_levels(encoded: OrbitTensor, *, threads: int = 1) -> Tensor:
    """The integer levels T[σ]: int8 (rows, columns), of the rotated weight where it is."""
    levels = np.empty((encoded.rows, encoded.columns), np.int8)
    codes, values = encoded.codes.numpy(), table(encoded.k, encoded.law).levels
    step = max(1, _AT_ONCE // encoded.columns)

    def one(first: int) -> None:
        trellis.levels(codes, encoded.k, values, first, min(first + step, encoded.rows), levels)

    each(one, range(0, encoded.rows, step), threads)
    return torch.from_numpy(levels)


def decode(encoded: OrbitTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor in the source's shape, and dtype unless another is given; rotation undone.

    fp32 in a fixed order: scale·T (exact), the inverse rotation, times the unit, plus the outlier; then one cast. What
    would overflow becomes the largest finite number.
    """
    levels = codes_to_levels(encoded).numpy()
    scales = encoded.scales.to(torch.float32).numpy()
    turns = signs(encoded.columns if encoded.block > 1 else 0, encoded.seed)
    weight = torch.empty((encoded.rows, encoded.columns), dtype=torch.float32)
    for part in _row_parts(encoded):
        plain = weight[part].numpy()
        trellis.restore(levels[part], scales[part], turns, encoded.block, norm(encoded.block), plain)
        weight[part] = _shift(weight[part], encoded.exponent)
    outliers = encoded.outliers
    if outliers.positions.numel():
        flat = weight.view(-1)
        flat[outliers.positions] = saturate(
            flat[outliers.positions].to(torch.float64) + outliers.full_values.to(torch.float64), torch.float32
        )
    return saturate(weight, dtype or encoded.dtype).view(encoded.shape)


def _row_parts(encoded: OrbitTensor) -> Iterator[slice]:
    step = max(1, _IN_CACHE // encoded.columns)
    for start in range(0, encoded.rows, step):
        yield slice(start, start + step)


__all__ = [
    "DEFAULT_SEED",
    "Estimate",
    "OrbitTensor",
    "Outliers",
    "Plan",
    "codes_to_levels",
    "decode",
    "encode",
    "encode_planned",
    "estimate",
]
