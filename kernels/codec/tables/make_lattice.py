"""Make ``lattice.json``: the integer frequency tables of the ``lattice`` codec. Needs scipy; nothing else imports this.

``python -m kernels.codec.tables.make_lattice`` writes the file anew. The shipped file is the specification, not this
program: another libm may round a frequency differently.

For each shape β and class j the levels q of a row are taken to follow a generalised Gaussian of unit variance,
density ∝ exp(−(|x|/α)^β), α² = Γ(1/β)/Γ(3/β), whose standard deviation is 2^(j/8) steps:
P(q) = F((q+½)/2^(j/8)) − F((q−½)/2^(j/8)). A table lists [escape, f(0), f(1), … f(Q)], f(−q) = f(q), with the sum
escape + f(0) + 2·(f(1) + … + f(Q)) = 4096 and no entry 0. Levels beyond Q escape, at the price of 32 bits more; Q and
the frequencies are those that cost the fewest bits under P.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special

BETAS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0)
LOWEST, HIGHEST = -32, 56
LARGEST = 126
TOTAL = 4096
ESCAPE_BITS = 32

Masses = NDArray[np.float64]


def probabilities(beta: float, j: int) -> Masses:
    """P(0), 2·P(1), … 2·P(126), and last what is beyond."""
    alpha = np.sqrt(special.gamma(1 / beta) / special.gamma(3 / beta))
    edges = (np.arange(LARGEST + 1) + 0.5) / 2 ** (j / 8)
    beyond = special.gammaincc(1 / beta, (edges / alpha) ** beta)
    return np.concatenate([[1 - beyond[0]], beyond[:-1] - beyond[1:], [beyond[-1]]])


def table(p: Masses, largest: int) -> tuple[list[int], float]:
    """The cheapest frequencies for levels up to ``largest``, and the mean bits a weight that they cost."""
    mass = np.concatenate([[p[largest + 1 :].sum()], p[: largest + 1]])
    members = np.array([1, 1] + [2] * largest)
    f = np.maximum(1, np.floor(TOTAL * mass / members)).astype(int)
    while left := TOTAL - int((f * members).sum()):
        if left > 0:
            gain = mass * np.log2((f + 1) / f) / members
            # An odd slot can only go to a group of one.
            gain[members > left] = -1
            f[int(gain.argmax())] += 1
        else:
            loss = np.where(f > 1, mass * np.log2(f / np.maximum(f - 1, 1)) / members, np.inf)
            f[int(loss.argmin())] -= 1
    bits = -float((mass * np.log2(f / TOTAL)).sum()) + ESCAPE_BITS * float(mass[0])
    return f.tolist(), bits


def best(beta: float, j: int) -> list[int]:
    """The cheapest table of a class."""
    p = probabilities(beta, j)
    found: tuple[list[int], float] | None = None
    for largest in range(LARGEST + 1):
        # Levels of more than a slot are coded in any case.
        if largest < LARGEST and TOTAL * p[largest + 1] > 1:
            continue
        made = table(p, largest)
        if found is None or made[1] < found[1]:
            found = made
        if TOTAL * p[largest] < 0.005:
            break
    assert found is not None
    return found[0]


def main() -> None:
    """Write the tables beside this program."""
    tables = [[best(beta, j) for j in range(LOWEST, HIGHEST + 1)] for beta in BETAS]
    document = {"version": 1, "betas": list(BETAS), "lowest": LOWEST, "tables": tables}
    path = Path(__file__).with_name("lattice.json")
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
