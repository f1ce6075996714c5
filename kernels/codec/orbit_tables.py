"""The integer tables of ``orbit``, read from ``tables/orbit.json`` once."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from kernels.codec.trellis_numba import FRACTION

LAWS = ("gauss", "laplace", "mixture")
"""The distributions G; a law is an index into these."""
BITS = (3, 4, 5, 6)
"""The values of k, bits a weight."""


@dataclass(frozen=True, eq=False)
class Table:
    """What coding with k bits under a law needs.

    ``levels``: T, int8 (4^k,), by the window σ = b_{i−1}·2^k + b_i. ``start``: the row scale for a row of unit rms
    that the encoder begins with. ``slopes``, ``bases``: see ``trellis_numba.viterbi``. Arrays are read-only.
    """

    levels: NDArray[np.int8]
    start: float
    slopes: NDArray[np.int32]
    bases: NDArray[np.int32]


@functools.cache
def _document() -> dict[str, dict[str, dict[str, object]]]:
    text = resources.files("kernels.codec").joinpath("tables/orbit.json").read_text(encoding="ascii")
    tables: dict[str, dict[str, dict[str, object]]] = json.loads(text)["tables"]
    return tables


@functools.cache
def table(k: int, law: int) -> Table:
    """The table for ``k`` bits (3 … 6) and ``law`` (0 … 2). Raises ValueError for others."""
    if k not in BITS or not 0 <= law < len(LAWS):
        raise ValueError(f"k must be from {BITS[0]} to {BITS[-1]} and law from 0 to {len(LAWS) - 1}, not {k} and {law}")
    entry = _document()[str(k)][LAWS[law]]
    levels = np.array(entry["levels"], dtype=np.int8)
    symbols = 1 << k
    by_target = np.ascontiguousarray(levels.reshape(symbols, symbols).T.astype(np.int32))
    slopes = by_target << (k + 1)
    bases = (by_target * by_target << (FRACTION + k)) | np.arange(symbols, dtype=np.int32)
    for array in (levels, slopes, bases):
        array.flags.writeable = False
    return Table(levels, float(str(entry["start"])), slopes, bases)
