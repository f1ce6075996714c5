"""The integer frequency tables of ``lattice``, read from ``tables/lattice.json``, and what coders derive from them.

A table of 4096 slots belongs to each shape β and class j. Its symbols are, in the order of their slots: the escape,
then the levels −Q … Q. ``docs/codec-v1.md`` has the format.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

BETAS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0)
"""Shapes of the generalised Gaussian; a tensor names one by its index here."""
LOWEST, HIGHEST = -32, 56
"""The classes that have tables."""
ZERO_ROW = -128
"""The class of a row whose levels are all 0; nothing is coded for it."""
ESCAPE = -128
"""Stands among int8 levels for a weight that is stored as it is."""
LARGEST = 126
"""The largest level that any table codes."""
SLOT_BITS = 12
COST_BITS = 16
"""Binary places of a cost: costs are in units of 2^−16 bit."""
ESCAPE_COST = 32 << COST_BITS
"""What the payload of an escape costs, in these units."""

_TOTAL = 1 << SLOT_BITS
_CLASSES = HIGHEST - LOWEST + 1


@dataclass(frozen=True, eq=False)
class Table:
    """The tables of one β; arrays are read-only, their first axis is the class, j − LOWEST.

    ``limit``: Q, int8 (classes,). ``frequency``, ``start``: int32 (classes, 256): of the symbol whose level is
    index − 128; index 0 is the escape; 0 for levels beyond Q. ``cost``: int32 (classes, 256): of a level in 2^−16 bit,
    payload included, the cost of an escape for levels beyond Q. ``slots``: uint32 (classes, 4096): the frequency
    << 20 | (slot − start) << 8 | (level + 128) of the slot's symbol. ``inverse``: uint64 (classes, 256):
    ⌊2^44 / frequency⌋ + 1.
    """

    limit: NDArray[np.int8]
    frequency: NDArray[np.int32]
    start: NDArray[np.int32]
    cost: NDArray[np.int32]
    slots: NDArray[np.uint32]
    inverse: NDArray[np.uint64]


@functools.cache
def _document() -> list[list[list[int]]]:
    text = resources.files("kernels.codec").joinpath("tables/lattice.json").read_text(encoding="ascii")
    tables: list[list[list[int]]] = json.loads(text)["tables"]
    return tables


@functools.cache
def _costs() -> NDArray[np.int32]:
    """Cost of a symbol by its frequency, 0 … 4096; that of 0 is not used.

    The logarithm of a whole number that is no power of two is never near a half of 2^−16, so every libm rounds it to
    the same whole number.
    """
    return np.array(
        [0] + [round((SLOT_BITS - math.log2(f)) * (1 << COST_BITS)) for f in range(1, _TOTAL + 1)], dtype=np.int32
    )


@functools.cache
def table(beta: int) -> Table:
    """The tables of the shape ``BETAS[beta]``."""
    frequency = np.zeros((_CLASSES, 256), dtype=np.int32)
    limit = np.zeros(_CLASSES, dtype=np.int8)
    for number, (escape, *rest) in enumerate(_document()[beta]):
        largest = len(rest) - 1
        limit[number] = largest
        frequency[number, 0] = escape
        frequency[number, 128 : 129 + largest] = rest
        frequency[number, 128 - largest : 128] = rest[:0:-1]
    start = np.cumsum(frequency, axis=1, dtype=np.int32) - frequency
    costs = _costs()[frequency]
    escapes = costs[:, :1] + np.int32(ESCAPE_COST)
    cost = np.where(frequency > 0, costs, escapes)
    cost[:, 0] = escapes[:, 0]
    slots = np.empty((_CLASSES, _TOTAL), dtype=np.uint32)
    for number in range(_CLASSES):
        symbol = np.repeat(np.arange(256), frequency[number])
        bias = np.arange(_TOTAL) - start[number, symbol]
        slots[number] = frequency[number, symbol].astype(np.int64) << 20 | bias << 8 | symbol
    inverse = ((1 << 44) // np.maximum(frequency, 1).astype(np.int64) + 1).astype(np.uint64)
    made = Table(limit, frequency, start, np.ascontiguousarray(cost), slots, inverse)
    for array in vars(made).values():
        array.flags.writeable = False
    return made


@functools.cache
def costs_of_all() -> NDArray[np.int32]:
    """The costs of every β: int32 (7, classes, 256)."""
    return np.stack([table(beta).cost for beta in range(len(BETAS))])
