"""Which coding each tensor gets, for a size or for an error.

Every tensor has a list of candidates, each with its bits and its squared error D: stored as it is, in half
precision, one of the orbits, or a lattice of any step (a curve, measured at a few steps and interpolated between).
Three policies choose among them:

``sensitivity``: the least Σ s_t·D_t, s_t a tensor's sensitivity (``hypersam.sensitivity``). By Lagrange's
method each tensor takes the candidate of least s_t·D + λ·bits, and λ is found by bisection (Shoham and Gersho
1988); for lattices this gives steps in proportion to 1/√s_t.
``equal_error``: the same relative error ‖w−ŵ‖/‖w‖ everywhere.
``equal_bits``: the same bits a weight everywhere.

What a policy leaves of the budget is spent greedily. All three end within a step of the budget, below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hypersam.errors import InvalidOption, TargetUnreachable

Encoding = Literal["raw", "half", "lattice", "orbit"]
Policy = Literal["sensitivity", "equal_error", "equal_bits"]
POLICIES: tuple[Policy, ...] = ("sensitivity", "equal_error", "equal_bits")
F64 = NDArray[np.float64]

SMALLEST_STEP, LARGEST_STEP = 2.0**-6, 2.0
"""Bounds of a lattice's step, in units of the tensor's root mean square."""
_MEASURED_STEPS = 10
_STEPS_BETWEEN = 60
_BISECTIONS = 60
WORST_RELATIVE_ERROR = 0.3
"""Relative error over which ``sensitivity`` drives no tensor if the budget allows: sensitivities hold for small
errors, and were measured on some pictures and prompts only."""


@dataclass(frozen=True)
class Choice:
    """A coding: ``step`` belongs to ``lattice`` (in units of the weights), ``k`` to ``orbit``."""

    encoding: Encoding
    step: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        if (self.step is not None) != (self.encoding == "lattice") or (self.k is not None) != (
            self.encoding == "orbit"
        ):
            raise ValueError("a lattice has a step and an orbit has k; other codings have neither")


@dataclass(frozen=True)
class TensorFacts:
    """What an allocation knows of a tensor.

    ``energy``: Σw². ``sensitivity``: squared movement for a unit of squared error; None where it was not
    measured: its relative error then counts as much as that of the others on average. ``discrete``: the codings
    allowed one by one; ``lattice``: whether lattices are, of any step. ``spread``: root mean square of what a
    lattice is laid over, in whose units its steps are bounded; None: that of the weights (where a codec takes an
    offset away first, it is the rest's).
    """

    name: str
    elements: int
    energy: float
    sensitivity: float | None = None
    discrete: tuple[Choice, ...] = (Choice("raw"), Choice("half"))
    lattice: bool = True
    spread: float | None = None

    def __post_init__(self) -> None:
        if not self.discrete and not self.lattice:
            raise ValueError(f"{self.name} has no candidate coding")
        if any(choice.encoding == "lattice" for choice in self.discrete):
            raise ValueError("lattices are not listed one by one; set lattice=True")


@dataclass(frozen=True)
class Cost:
    """What a coding costs: bits in all, side information counted, and Σ(w−ŵ)²."""

    bits: float
    squared_error: float


Estimate = Callable[[TensorFacts, Choice], Cost]


@dataclass(frozen=True)
class Plan:
    """A coding for every tensor, with the bytes and the squared error that the estimates promise for it."""

    policy: Policy
    choices: Mapping[str, Choice]
    nbytes: Mapping[str, float]
    squared_error: Mapping[str, float]
    movement: float = field(default=math.nan)

    @property
    def total_bytes(self) -> float:
        """Bytes of all tensors."""
        return math.fsum(self.nbytes.values())


@dataclass(frozen=True)
class Curves:
    """The candidates of every tensor, measured once; solving for a size or an error then takes milliseconds.

    Row t of each array belongs to ``tensors[t]``: bits, squared error, and the choice's number in
    ``choices[t]``, padded with infinities. Rows are in order of falling bits and of growing error, with every
    candidate gone that another one beats in both.
    """

    tensors: tuple[TensorFacts, ...]
    choices: tuple[tuple[Choice, ...], ...]
    bits: F64
    error: F64

    @property
    def names(self) -> frozenset[str]:
        """The tensors that have candidates."""
        return frozenset(t.name for t in self.tensors)

    @classmethod
    def joined(cls, parts: Sequence[Curves]) -> Curves:
        """One set of curves from several, of other tensors each: they can be measured side by side."""
        width = max((part.bits.shape[1] for part in parts), default=0)

        def stacked(values: list[F64]) -> F64:
            wide = [np.pad(v, ((0, 0), (0, width - v.shape[1])), constant_values=np.inf) for v in values]
            return np.concatenate([np.empty((0, width)), *wide])

        return cls(
            tensors=tuple(t for part in parts for t in part.tensors),
            choices=tuple(c for part in parts for c in part.choices),
            bits=stacked([part.bits for part in parts]),
            error=stacked([part.error for part in parts]),
        )


def curves(tensors: Sequence[TensorFacts], estimate: Estimate, *, max_error: float | None = None) -> Curves:
    """Measure the candidates: ``estimate`` is called some fifteen times a tensor that may be a lattice, and once
    a discrete choice. ``max_error`` leaves out whatever has a larger relative error. The steps of a lattice that
    were not measured get bits and error by cubic interpolation over log Δ.

    Raises InvalidOption where ``max_error`` leaves a tensor no candidate.
    """
    rows = [_front(_candidates(tensor, estimate), tensor, max_error) for tensor in tensors]
    width = max((len(row) for row in rows), default=0)
    bits, error = np.full((len(rows), width), np.inf), np.full((len(rows), width), np.inf)
    for t, row in enumerate(rows):
        bits[t, : len(row)] = [cost.bits for _, cost in row]
        error[t, : len(row)] = [cost.squared_error for _, cost in row]
    return Curves(tuple(tensors), tuple(tuple(choice for choice, _ in row) for row in rows), bits, error)


def solve(found: Curves, budget: float, *, policy: Policy = "sensitivity") -> Plan:
    """The plan of a policy whose bytes come closest to ``budget`` from below.

    Raises InvalidOption where even the smallest candidates exceed the budget, naming their size.
    """
    if policy not in POLICIES:
        raise InvalidOption(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    if not found.tensors:
        return Plan(policy, {}, {}, {}, 0.0)
    limit = 8.0 * budget
    smallest = float(found.bits.min(axis=1).sum())
    if smallest > limit:
        raise TargetUnreachable(f"{budget:.0f} bytes are too few for these tensors; the least is {smallest / 8:.0f}")
    if policy == "sensitivity":
        careful = _within(found, WORST_RELATIVE_ERROR)
        found = careful if careful.bits.min(axis=1).sum() <= limit else found
    pick = _POLICIES[policy](found)
    low, high = -120.0, 120.0  # log2 of λ, or of the allowed error, or of the bits: larger is smaller in size
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _taken(found.bits, pick(middle)) > limit else (low, middle)
    return _plan(found, _spend_rest(found, pick(high), limit, policy), policy)


def smallest_within(found: Curves) -> Plan:
    """The smallest candidate of every tensor: with curves made under ``max_error`` the smallest plan that keeps it."""
    if not found.tensors:
        return Plan("equal_error", {}, {}, {}, 0.0)
    return _plan(found, found.bits.argmin(axis=1), "equal_error")


def movement_of(tensors: Sequence[TensorFacts]) -> F64:
    """The weight of every tensor's squared error: its sensitivity, or for one without, what makes its relative
    error count as the mean of those that move anything. A tensor that moves nothing weighs a millionth of the mean."""
    energy = np.array([t.energy for t in tensors], np.float64)
    known = np.array([np.nan if t.sensitivity is None else t.sensitivity for t in tensors], np.float64)
    relative = known * energy
    measured = np.isfinite(relative)
    felt = relative[measured & (relative > 0)]
    typical = float(felt.mean()) if felt.size else 1.0
    relative = np.where(measured, np.maximum(relative, 1e-6 * typical), typical)
    return relative / np.where(energy > 0, energy, 1.0)


def _candidates(tensor: TensorFacts, estimate: Estimate) -> list[tuple[Choice, Cost]]:
    found = [(choice, estimate(tensor, choice)) for choice in tensor.discrete]
    rms = math.sqrt(tensor.energy / max(1, tensor.elements)) if tensor.spread is None else tensor.spread
    if not tensor.lattice or rms == 0:
        if not found:
            choice = Choice("lattice", step=1.0)  # a tensor of zeros: any step gives it exactly
            found = [(choice, estimate(tensor, choice))]
        return found
    at = np.linspace(math.log2(SMALLEST_STEP * rms), math.log2(LARGEST_STEP * rms), _MEASURED_STEPS)
    costs = [estimate(tensor, Choice("lattice", step=float(2.0**x))) for x in at]
    fine = np.linspace(at[0], at[-1], (_MEASURED_STEPS - 1) * _STEPS_BETWEEN + 1)
    bits = _cubic(np.array([c.bits for c in costs]), _STEPS_BETWEEN)
    # An error of zero (weights that lie on the lattice) has no logarithm; far below fp32's own is as good.
    tiny = 1e-16 * tensor.energy
    error = 2.0 ** _cubic(np.log2([max(c.squared_error, tiny) for c in costs]), _STEPS_BETWEEN)
    found += [
        (Choice("lattice", step=float(2.0**x)), Cost(float(b), float(e)))
        for x, b, e in zip(fine, bits, error, strict=True)
    ]
    return found


def _cubic(values: F64, between: int) -> F64:
    """Cubic Hermite interpolation (Catmull-Rom) of evenly spaced values: ``between`` − 1 new ones in each gap."""
    slope = np.gradient(values)
    x = (np.arange(between) / between)[None, :]
    a, b, m, n = (v[:, None] for v in (values[:-1], values[1:], slope[:-1], slope[1:]))
    d = b - a
    inner = a + x * (m + x * (3 * d - 2 * m - n + x * (m + n - 2 * d)))
    return np.append(inner.ravel(), values[-1])


def _front(
    candidates: list[tuple[Choice, Cost]], tensor: TensorFacts, max_error: float | None
) -> list[tuple[Choice, Cost]]:
    """Candidates within the error, without those that another beats in bits and error; falling bits."""
    if max_error is not None:
        bound = max_error**2 * tensor.energy
        candidates = [c for c in candidates if c[1].squared_error <= bound]
    if not candidates:
        raise TargetUnreachable(f"no coding of {tensor.name} keeps a relative error of {max_error}")
    front: list[tuple[Choice, Cost]] = []
    for candidate in sorted(candidates, key=lambda c: (c[1].bits, c[1].squared_error)):
        if not front or candidate[1].squared_error < front[-1][1].squared_error:
            front.append(candidate)
    return front[::-1]


def _within(found: Curves, worst: float) -> Curves:
    """The same curves without candidates of a larger relative error; a tensor's most exact one always stays."""
    allowed = worst**2 * np.array([t.energy for t in found.tensors])[:, None]
    gone = found.error > allowed
    gone[:, :1] = False
    return replace(found, bits=np.where(gone, np.inf, found.bits), error=np.where(gone, np.inf, found.error))


def _least_movement(found: Curves) -> Callable[[float], NDArray[np.intp]]:
    weight = movement_of(found.tensors)[:, None]
    scale = float(np.median(weight[:, 0] * np.where(np.isfinite(found.error), found.error, 0).max(axis=1))) or 1.0
    moved = weight * found.error / scale
    return lambda x: np.argmin(moved + 2.0**x * found.bits, axis=1)


def _equal_error(found: Curves) -> Callable[[float], NDArray[np.intp]]:
    energy = np.array([t.energy or 1.0 for t in found.tensors])[:, None]
    relative = found.error / energy
    return lambda x: _last_within(relative, 2.0**x)


def _equal_bits(found: Curves) -> Callable[[float], NDArray[np.intp]]:
    each = found.bits / np.array([max(1, t.elements) for t in found.tensors])[:, None]
    within = np.where(np.isfinite(each), each, np.inf)
    last = np.isfinite(each).sum(axis=1) - 1
    # The first candidate (fewest errors) of at most that many bits; the smallest where none is so small.
    return lambda x: np.where((within <= 2.0**-x).any(axis=1), np.argmax(within <= 2.0**-x, axis=1), last)


_POLICIES: dict[Policy, Callable[[Curves], Callable[[float], NDArray[np.intp]]]] = {
    "sensitivity": _least_movement,
    "equal_error": _equal_error,
    "equal_bits": _equal_bits,
}


def _last_within(relative: F64, bound: float) -> NDArray[np.intp]:
    """In each row the last (smallest) candidate of at most that error; the most exact one where none is."""
    last: NDArray[np.intp] = np.maximum((relative <= bound).sum(axis=1) - 1, 0)
    return last


def _taken(values: F64, pick: NDArray[np.intp]) -> float:
    return float(np.take_along_axis(values, pick[:, None], axis=1).sum())


def _spend_rest(found: Curves, pick: NDArray[np.intp], limit: float, policy: Policy) -> NDArray[np.intp]:
    """Move tensors up their curves one candidate at a time, the best gain for its bits first, while they fit.
    The policies of equality move none twice, or it would not be equal any more."""
    energy = np.array([t.energy or 1.0 for t in found.tensors])
    weight = movement_of(found.tensors) if policy == "sensitivity" else 1 / energy
    pick = pick.copy()
    still = np.ones(len(pick), bool)
    left = limit - _taken(found.bits, pick)
    row = np.arange(len(pick))
    while len(pick):
        up = np.maximum(pick - 1, 0)
        # What a bound removed at a row's end has infinite bits, and is never above a candidate that was picked.
        bits = found.bits[row, up] - found.bits[row, pick]
        gain = weight * (found.error[row, pick] - found.error[row, up])
        value = np.where(still & (pick > 0) & (bits <= left), gain / np.maximum(bits, 1e-9), -1.0)
        best = int(value.argmax())
        if value[best] < 0:
            break
        left -= float(bits[best])
        pick[best] -= 1
        still[best] = policy == "sensitivity"
    return pick


def _plan(found: Curves, pick: NDArray[np.intp], policy: Policy) -> Plan:
    names = [t.name for t in found.tensors]
    row = np.arange(len(pick))
    bits, error = found.bits[row, pick], found.error[row, pick]
    return Plan(
        policy=policy,
        choices={name: found.choices[t][int(pick[t])] for t, name in enumerate(names)},
        nbytes={name: float(b) / 8 for name, b in zip(names, bits, strict=True)},
        squared_error={name: float(e) for name, e in zip(names, error, strict=True)},
        movement=float((movement_of(found.tensors) * error).sum()),
    )
