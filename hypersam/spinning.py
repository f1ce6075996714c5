"""How long OpenMP's threads spin while they wait for work."""

from __future__ import annotations

import os

SPINS = "10000"


def spin_briefly() -> None:
    """Call it before torch is loaded; processes that are started inherit it, and what the environment says stays.

    By default the threads spin for milliseconds, and whatever shares the cores becomes several times slower. Where they
    sleep at once, waking them takes half of a click on a small model. Now they spin for a tenth of a millisecond, which
    is longer than it is between two operations.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
