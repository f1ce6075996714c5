"""Make ``orbit.json``: the integer tables of the ``orbit`` codec. Needs scipy; nothing else imports this module.

``python -m kernels.codec.tables.make_orbit`` writes the file anew. The shipped file is the specification, not this
program: another libm may round a level differently.

For b bits a weight and memory L = 2b the window σ of L digits becomes u = ((A·σ mod 2^L) + ½)/2^L and the level
T[σ] = round(127·G⁻¹(u)/max), max the largest |G⁻¹(u)|. ``start`` is 1.22 (1.30 for the heavier tails)·max/127, the row
scale the encoder begins with for a row of unit rms.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy import optimize, stats

MULTIPLIER = {3: 35, 4: 121, 5: 175, 6: 605}
_MIXTURE = ((0.35, 0.7), (0.45, 1.0), (0.20, 1.45))
# Found by measuring; a row scale of the encoder's alone. From 1.00 it loses 0.5 to 1 dB.
_START = {"gauss": 1.22, "laplace": 1.30, "mixture": 1.30}


def _mixture(u: np.ndarray) -> np.ndarray:
    """Quantiles of the mixture of three Gaussians, scaled to unit variance; u ascending and symmetric about ½."""
    variance = sum(share * sigma**2 for share, sigma in _MIXTURE)

    def excess(x: float, level: float) -> float:
        return float(sum(share * stats.norm.cdf(x / sigma) for share, sigma in _MIXTURE)) - level

    half = [optimize.brentq(excess, -20.0, 0.0, args=(level,), xtol=1e-13) for level in u[: len(u) // 2]]
    return np.asarray([*half, *(-x for x in reversed(half))]) / float(np.sqrt(variance))


def _quantiles(law: str, u: np.ndarray) -> np.ndarray:
    if law == "gauss":
        return np.asarray(stats.norm.ppf(u))
    if law == "laplace":
        return np.asarray(stats.laplace.ppf(u, scale=np.sqrt(0.5)))
    return _mixture(u)


def main() -> None:
    """Write the tables beside this program."""
    tables: dict[str, dict[str, object]] = {}
    for k, multiplier in MULTIPLIER.items():
        states = 1 << 2 * k
        u = (np.arange(states) + 0.5) / states
        place = multiplier * np.arange(states) % states
        entry: dict[str, object] = {"multiplier": multiplier}
        for law in ("gauss", "laplace", "mixture"):
            quantiles = _quantiles(law, u)
            largest = float(np.abs(quantiles).max())
            levels = np.rint(127 * quantiles / largest).astype(int)[place]
            entry[law] = {"start": _START[law] * largest / 127, "levels": levels.tolist()}
        tables[str(k)] = entry
    path = Path(__file__).with_name("orbit.json")
    path.write_text(json.dumps({"version": 1, "tables": tables}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
