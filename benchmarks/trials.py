"""Quantisers that were tried for ``lattice`` and not taken: what they gain over its whole numbers at the same bits.

Idealised: bits are entropies of what would be coded, given what a decoder knows by then; no stream is written. Rows of
unit variance, the same draws for every way. ``docs/codec-trials.md`` tells what came of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from benchmarks.record import append

F64 = NDArray[np.float64]
Tried = Callable[[F64, float], tuple[float, F64]]
"""Weights (rows, columns) and a step to bits a weight and what the weights become."""

STEPS = tuple(2.0**-e for e in (1.5, 2.25, 3.2, 4.1))
"""Of the plain quantiser; about 3.6, 4.3, 5.2 and 6.1 bits a weight on Gaussian rows."""


def sources(rows: int, columns: int) -> dict[str, F64]:
    """Rows of three distributions, unit variance."""
    rng = np.random.default_rng(0)
    return {
        "gauss": rng.standard_normal((rows, columns)),
        "laplace": rng.laplace(size=(rows, columns)) / math.sqrt(2),
        "student_t5": rng.standard_t(5, (rows, columns)) * math.sqrt(3 / 5),
    }


def scalar(weights: F64, step: float) -> tuple[float, F64]:
    """Whole multiples of a step, as ``lattice`` has them."""
    levels = np.rint(weights / step)
    return _entropy(levels), levels * step


def e8(weights: F64, step: float) -> tuple[float, F64]:
    """Groups of eight to the nearest point of E8, whole numbers of even sum or all of them moved by a half.

    The bit a group that names the coset and the bit that the even sum saves cancel.
    """
    groups = (weights / step).reshape(-1, 8)
    made = np.stack([_nearest_even(groups), _nearest_even(groups - 0.5) + 0.5])
    coset = np.square(groups - made).sum(-1).argmin(0)
    points = made[coset, np.arange(len(groups))]
    share = coset.mean()
    bits = share * _entropy(points[coset == 1]) + (1 - share) * _entropy(points[coset == 0])
    return bits, points.reshape(weights.shape) * step


def _nearest_even(groups: F64) -> F64:
    """Nearest point of D8: where the rounded numbers sum to an odd one, the worst rounded goes the other way."""
    rounded = np.rint(groups)
    off = groups - rounded
    worst = np.abs(off).argmax(-1)
    rows = np.arange(len(groups))
    odd = rounded.sum(-1) % 2 == 1
    rounded[rows, worst] += odd * np.where(off[rows, worst] >= 0, 1, -1)
    return rounded


# Next state by the parity of the level; the state's quantiser: even multiples of half a step, or odd ones and zero
# (dependent quantisation as in video coding: Schwarz et al., "Hybrid video coding with trellis-coded quantization").
TRELLISES = {
    4: (np.array([[0, 2], [2, 0], [1, 3], [3, 1]]), np.array([0, 0, 1, 1])),
    8: (np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]]), np.array([0, 1] * 4)),
}


def dependent(states: int) -> Tried:
    """Two quantisers, one chosen by the levels before: the row's best path by Viterbi."""
    following, quantiser = TRELLISES[states]

    def tried(weights: F64, step: float) -> tuple[float, F64]:
        levels = np.empty(weights.shape, np.int32)
        chosen = np.empty(weights.shape, np.int8)
        _viterbi(weights / (step / 2), following, quantiser, levels, chosen)
        points = np.where(chosen == 0, 2 * levels, 2 * levels - np.sign(levels))
        bits = sum(float((chosen == i).mean()) * _entropy(levels[chosen == i]) for i in (0, 1))
        return bits, points * (step / 2)

    return tried


@njit(cache=True)
def _viterbi(
    weights: F64, following: NDArray[np.int64], quantiser: NDArray[np.int64], levels: NDArray[np.int32],
    chosen: NDArray[np.int8],
) -> None:  # fmt: skip
    rows, columns = weights.shape
    states = len(following)
    origin, level = np.empty((columns, states), np.int8), np.empty((columns, states), np.int32)
    for row in range(rows):
        cost = np.full(states, np.inf)
        cost[0] = 0.0
        for column in range(columns):
            x = weights[row, column]
            reached = np.full(states, np.inf)
            for state in range(states):
                odd = quantiser[state]
                below = math.floor((x + math.copysign(1.0, x) * odd) / 2)
                for k in range(below - 1, below + 3):
                    point = 2.0 * k - odd * (1.0 if k > 0 else (-1.0 if k < 0 else 0.0))
                    total, to = cost[state] + (x - point) ** 2, following[state, k & 1]
                    if total < reached[to]:
                        reached[to], origin[column, to], level[column, to] = total, state, k
            cost = reached
        state = int(cost.argmin())
        for column in range(columns - 1, -1, -1):
            levels[row, column] = level[column, state]
            state = int(origin[column, state])
            chosen[row, column] = quantiser[state]


WAYS: dict[str, Tried] = {"E8": e8, "dependent, 4 states": dependent(4), "dependent, 8 states": dependent(8)}


def run(rows: int = 512, columns: int = 1024) -> Iterator[dict[str, Any]]:
    """A row for each distribution, way and step, with what it gains over ``scalar`` at the same bits."""
    for source, weights in sources(rows, columns).items():
        curve = np.array([_measured(scalar, weights, 2.0**-e) for e in np.arange(0.5, 6.6, 0.25)])
        for way, tried in WAYS.items():
            tried(weights[:1], 1.0)  # what is compiled at the first call is not timed
            for step in STEPS:
                began = time.process_time()
                bits, sqnr_db = _measured(tried, weights, step)
                row = {
                    "source": source, "way": way, "bits_per_weight": bits, "sqnr_db": sqnr_db,
                    "gain_db": sqnr_db - float(np.interp(bits, curve[:, 0], curve[:, 1])),
                    "million_per_cpu_s": weights.size / (time.process_time() - began) / 1e6,
                }  # fmt: skip
                append("trials", row)
                yield row


def _measured(tried: Tried, weights: F64, step: float) -> tuple[float, float]:
    bits, made = tried(weights, step)
    return bits, 10 * math.log10(float(np.square(weights).sum() / np.square(weights - made).sum()))


def _entropy(symbols: NDArray[Any]) -> float:
    """Bits a symbol, of the symbols' own frequencies."""
    counts = np.unique(symbols, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
