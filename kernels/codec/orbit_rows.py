"""Coding rows for ``orbit``, and choosing how: the law, and a rotation, or a few weights kept apart, or neither."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.codec import trellis_numba as trellis
from kernels.codec.hadamard import block_size, norm, signs
from kernels.codec.orbit_format import row_bytes
from kernels.codec.orbit_tables import BITS, LAWS, table
from kernels.codec.types import CODED_DTYPES

DEFAULT_SEED = 0x6F72626974
_LANES = 128
# The most weights that are searched side by side: bounds the memory of a thread (some 40 MB, and up to 64 more at k 6).
_LANE_WEIGHTS = 1 << 22
SAMPLE_ROWS = 64
_SAMPLE_COLUMNS = 256
_QUANTILE_SAMPLE = 1 << 17
# A value and its gap, with the gap bytes' escapes at 0.3 %.
OUTLIER_BITS = 31
# What is nearer to zero than this many rms is no outlier, however few the weights.
_LEAST_OUTLIER = 2.0


@dataclass(frozen=True)
class Plan:
    """How a tensor is coded: ``law``, ``block`` (1: no rotation), ``seed``, and the ``threshold`` in units of a row's
    rms beyond which a weight is kept apart (infinity: none).
    """

    law: int
    block: int = 1
    seed: int = DEFAULT_SEED
    threshold: float = math.inf


@dataclass(frozen=True, eq=False)
class Matrix:
    """A tensor as fp32 (rows, columns), and ``exponent`` e: the weights times 2^−e are under 2 in size."""

    weight: NDArray[np.float32]
    exponent: int

    @classmethod
    def of(cls, weight: Tensor, columns: int) -> Matrix:
        """Read a tensor. Raises ValueError for what cannot be coded, as ``orbit.encode`` states."""
        if weight.dtype not in CODED_DTYPES:
            raise ValueError(f"orbit codes floating tensors, not {weight.dtype}")
        if weight.numel() == 0 or columns < 1 or weight.numel() % columns:
            raise ValueError(f"rows of {columns} do not divide {weight.numel()} weights")
        flat = weight.detach().to("cpu", torch.float32).contiguous().view(-1, columns)
        low, high = (float(value) for value in flat.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinity (as fp32) cannot be coded")
        _, exponent = math.frexp(max(-low, high))
        # 2^−e itself must be a normal fp32.
        return cls(flat.numpy(), min(max(exponent - 1, -126), 126))

    @property
    def scale(self) -> np.float32:
        """2^−e."""
        return np.float32(2.0**-self.exponent)


@dataclass(frozen=True, eq=False)
class Rows:
    """Coded rows: ``codes`` uint8 (rows, bytes); ``scales`` float64 (rows,), of the scaled weights; ``threshold``
    float64 (rows,); ``counts`` of outliers, int64 (rows,); ``errors`` float64 (rows,), filled only where wanted.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float64]
    threshold: NDArray[np.float64]
    counts: NDArray[np.int64]
    errors: NDArray[np.float64]

    @classmethod
    def empty(cls, rows: int, columns: int, k: int) -> Rows:
        """Room for rows to come."""
        real = [np.zeros(rows, np.float64) for _ in range(3)]
        return cls(
            np.empty((rows, row_bytes(columns, k)), np.uint8), real[0], real[1], np.zeros(rows, np.int64), real[2]
        )


def encode_rows(matrix: Matrix, k: int, plan: Plan, *, threads: int = 1, errors: bool = False) -> Rows:
    """Code all rows by a plan, up to 128 side by side on each of ``threads`` threads. ``errors``: measure them too."""
    rows, columns = matrix.weight.shape
    found = Rows.empty(rows, columns, k)
    lanes = max(1, min(_LANES, rows, _LANE_WEIGHTS // columns))

    def one(first: int) -> None:
        _encode_block(matrix, k, plan, first, min(lanes, rows - first), found, errors)

    each(one, range(0, rows, lanes), threads)
    return found


def each(task: Callable[[int], None], starts: range, threads: int) -> None:
    """Run ``task`` for every start, on ``threads`` threads."""
    if threads <= 1 or len(starts) == 1:
        for start in starts:
            task(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(task, starts):
            pass


def _encode_block(matrix: Matrix, k: int, plan: Plan, first: int, lanes: int, found: Rows, errors: bool) -> None:
    """Code ``lanes`` rows from ``first`` on, side by side."""
    tables = table(k, plan.law)
    columns = matrix.weight.shape[1]
    x = np.empty((columns, lanes), np.float32)
    trellis.load(matrix.weight, first, matrix.scale, x)
    if plan.block > 1:
        trellis.rotate(x, signs(columns, plan.seed), plan.block, norm(plan.block))
    spread = np.empty(lanes, np.float64)
    trellis.rms(x, spread)
    counts, threshold = found.counts[first : first + lanes], found.threshold[first : first + lanes]
    if plan.threshold < math.inf:
        threshold[:] = plan.threshold * spread
        trellis.clear_outliers(x, threshold, counts)
        trellis.rms(x, spread)
    begin = spread * tables.start / (1 << trellis.FRACTION)
    up = np.divide(1.0, begin, out=np.zeros(lanes), where=begin > 0)
    whole = np.empty((columns, lanes), np.int32)
    trellis.quantise(x, up, whole)
    codes = np.empty((columns, lanes), np.uint8)
    trellis.viterbi(whole, tables.slopes, tables.bases, codes)
    codes[:, begin == 0] = 0
    cross, power = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    trellis.correlate(whole, codes, tables.levels, k, cross, power)
    fit = np.maximum(cross, 0) / np.maximum(power, 1)
    scales = fit * begin
    found.scales[first : first + lanes] = scales
    trellis.pack(codes, k, first, found.codes)
    if errors:
        apart = plan.threshold < math.inf
        trellis.squared_error(x, codes, tables.levels, k, scales, apart, found.errors[first : first + lanes])


def choose(matrix: Matrix, k: int, law: int | None, rotate: bool | None, outliers: float, seed: int) -> Plan:
    """The plan of least squared error on a sample, a bit being worth a factor of four."""
    if k not in BITS:
        raise ValueError(f"k must be from {BITS[0]} to {BITS[-1]}, not {k}")
    if law is not None and not 0 <= law < len(LAWS):
        raise ValueError(f"law must be from 0 to {len(LAWS) - 1}, not {law}")
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers must be from 0 to under 1, not {outliers}")
    block = block_size(matrix.weight.shape[1])
    if rotate and block == 1:
        rotate = False
    threshold = _threshold(matrix.weight, matrix.scale, outliers) if not rotate else math.inf
    ways: list[tuple[int, float]] = []
    if rotate is not False and block > 1:
        ways.append((block, math.inf))
    if rotate is None or threshold == math.inf:
        ways += [(1, math.inf)] if not rotate else []
    if threshold < math.inf:
        ways.append((1, threshold))
    plans = [Plan(one, *way[:1], seed, way[1]) for way in ways for one in (range(len(LAWS)) if law is None else (law,))]
    if len(plans) == 1:
        return plans[0]
    sample = _sample(matrix, block)

    def score(plan: Plan) -> float:
        rows = encode_rows(sample, k, plan, errors=True)
        apart = float(rows.counts.sum()) / sample.weight.size
        return float(rows.errors.sum()) * math.pow(4.0, OUTLIER_BITS * apart)

    return min(plans, key=score)


def _sample(matrix: Matrix, block: int) -> Matrix:
    """Up to 64 pieces of rows, evenly over the rows and spread over the columns."""
    rows, columns = matrix.weight.shape
    width = min(columns, _SAMPLE_COLUMNS)
    if columns > width and block > 1:
        width -= width % block
    places = columns // width
    wanted = min(rows * places, SAMPLE_ROWS)
    chosen = [(index * rows * places // wanted) for index in range(wanted)]
    pieces = [
        matrix.weight[place // places, start : start + width]
        for index, place in enumerate(chosen)
        # The place within the row moves on with each piece, so that not all come from the first columns.
        for start in (width * ((place % places + (index if rows >= wanted else 0)) % places),)
    ]
    return Matrix(np.stack(pieces), matrix.exponent)


def _threshold(weight: NDArray[np.float32], scale: np.float32, share: float) -> float:
    """The size, in units of a row's rms, that about ``share`` of the weights exceed; infinity for none."""
    rows, columns = weight.shape
    step = max(1, min(rows, weight.size // _QUANTILE_SAMPLE))
    stride = max(1, rows // step * columns // _QUANTILE_SAMPLE)
    part = np.abs(weight[::step, ::stride].astype(np.float64)) * float(scale)
    spread = np.sqrt(np.mean(part * part, axis=1, keepdims=True))
    ratios = np.divide(part, spread, out=np.zeros_like(part), where=spread > 0).reshape(-1)
    apart = round(share * len(ratios))
    if apart == 0:
        return math.inf
    return max(float(np.partition(ratios, len(ratios) - apart - 1)[len(ratios) - apart - 1]), _LEAST_OUTLIER)
